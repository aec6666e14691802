"""Every choice a user makes about a reranker, in one place for Python, the adapters and the command line.

A setting that is not given is looked up in the environment (`MISTRAL_RERANK_MODEL`, `MISTRAL_RERANK_DEVICE`, ...),
so a program moves to another model or device without a change of code.
"""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, field_validator

from mistral_rerank._suggestions import suggest
from mistral_rerank._values import plain
from mistral_rerank.errors import SettingsError
from mistral_rerank.reranker import Overflow, Quantization

if TYPE_CHECKING:
    from collections.abc import Collection
    from os import PathLike

    from mistral_rerank.reranker import Reranker

ENV_PREFIX = "MISTRAL_RERANK_"
OTHER_VARIABLES = ("api_key", "cache", "embeddings_api_key")
OTHER_PREFIXES = ("MISTRAL_RERANK_SERVER_", "MISTRAL_RERANK_CLUSTER_")
DEFAULT_MODEL = "mini"


def environment_field(variable: str, default: object, description: str, **constraints: Any) -> Any:
    """Declare a field whose default comes from the environment, read anew for each instance."""
    return Field(
        default_factory=lambda: os.environ.get(variable) or default,
        validate_default=True,
        description=description,
        **constraints,
    )


def _header_pairs(value: object) -> object:
    """Read a mapping, or one in JSON, as pairs, which can be hashed as every setting can."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ValueError('not a JSON object like {"api-key": "..."}')
    return tuple(value.items()) if isinstance(value, Mapping) else value


Headers = Annotated[tuple[tuple[str, SecretStr], ...], BeforeValidator(_header_pairs)]


class RerankSettings(BaseModel):
    """Which model, where it runs, and how it reads long passages.

    `backend` alone moves from this machine to an endpoint and back: the settings of the other one are ignored.
    Paths, numpy numbers, `torch.device` and `torch.dtype` are taken where a string or a number is.

    Raises:
        SettingsError: an option is not known, or a value does not fit; also on assignment.

    """

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        protected_namespaces=(),
        hide_input_in_errors=True,  # a key under a misspelled name
        json_schema_extra=lambda schema: schema.update(description=str(schema["description"]).split("\n\n")[0]),
    )

    backend: Literal["local", "remote"] = Field("local", description="this machine, or an HTTP endpoint")
    model: str | None = Field(
        None, description="mini (local default), a checkpoint folder, a hub id, or a name at the endpoint"
    )
    base: str | None = Field(
        None, description="under an adapter that was trained on a folder: that folder, or a hub id"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto is bfloat16 where the hardware multiplies it"
    )
    quantization: Quantization | None = Field(
        None, description="int8: faster on a CPU with VNNI instructions; nf4: weights in 4 bits; other scores"
    )
    max_length: int | None = Field(None, ge=8, description="most tokens of a pair; default: the checkpoint's")
    overflow: Overflow = Field("truncate", description="what happens to a passage over the limit")
    batch_tokens: int | None = Field(None, ge=1, description="most tokens that a batch computes")
    share_batches: bool | None = Field(
        None, description="whether concurrent calls may share batches; default: on accelerators"
    )
    cascade_depth: int | None = Field(
        None, ge=1, description="passages of a question that are read to the end, chosen by the lower layers"
    )
    cache_size: int = Field(0, ge=0, description="pairs whose scores are kept for the next time")
    base_url: str | None = Field(None, description="the endpoint's; default: the vendor's own")
    protocol: Literal["auto", "nvidia", "cohere", "jina", "vllm", "tei", "voyage"] = Field(
        "auto", description="the protocol that the endpoint speaks; auto finds out"
    )
    api_key: SecretStr | None = Field(
        None,
        exclude=True,
        description="default: MISTRAL_RERANK_API_KEY; at a vendor's hosts its variable, such as NVIDIA_API_KEY",
    )
    headers: Headers = Field(
        (),
        exclude=True,
        description='sent to base_url with every request; from the environment as JSON, like {"api-key": "..."}',
    )
    timeout: float = Field(120.0, gt=0, description="seconds that a remote call may take in all")
    retries: int = Field(2, ge=0, description="how often a failed request is sent again")
    max_passages: int | None = Field(None, ge=1, description="most passages of a request; default: as allowed")
    max_concurrency: int = Field(8, ge=1, description="most requests of one call at once")
    requests_per_minute: float | None = Field(None, gt=0, description="most requests a minute")
    score_unit: Literal["auto", "logit", "probability"] = Field(
        "auto", description="what the endpoint's scores are; auto goes by its protocol"
    )

    if not TYPE_CHECKING:  # type checkers go by the fields

        def __init__(self, /, **given: Any) -> None:
            known = type(self).model_fields
            from_environment = {
                name: value
                for name in RerankSettings.model_fields
                if name not in {"api_key", *given} and (value := os.environ.get(ENV_PREFIX + name.upper()))
            }
            try:
                super().__init__(**from_environment, **given)
            except ValidationError as error:
                raise SettingsError(describe(error, known, from_environment)) from error
            variables = {*RerankSettings.model_fields, *OTHER_VARIABLES}
            warn_of_unknown_variables(ENV_PREFIX, variables, others=OTHER_PREFIXES)
            if "backend" not in self.model_fields_set:
                self._warn_of_an_endpoint_that_is_not_used()

        def __setattr__(self, name: str, value: object) -> None:
            try:
                super().__setattr__(name, value)
            except ValidationError as error:
                raise SettingsError(describe(error, type(self).model_fields)) from error

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        _document(cls)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: object) -> object:
        return plain(value)

    def _warn_of_an_endpoint_that_is_not_used(self) -> None:
        for name in ("base_url", "protocol", "api_key", "headers"):
            if name in self.model_fields_set and getattr(self, name) not in {None, "auto", ()}:
                warnings.warn(
                    f"{name} is set and backend is not, so the model runs on this machine; "
                    "give backend='remote' (or MISTRAL_RERANK_BACKEND=remote) to use the endpoint",
                    stacklevel=3,
                )
                return

    @property
    def named_model(self) -> str:
        """The model in words, also where none is set."""
        return self.model or (DEFAULT_MODEL if self.backend == "local" else self.base_url or self.protocol)

    def open(self) -> Reranker:
        """Make the reranker that these settings describe; on first use its model is loaded, or its endpoint asked.

        Raises:
            SettingsError: the device is not on this machine, or the base URL is unusable.
            MissingDependencyError: the extra `local` is not installed.

        """
        if self.backend == "remote":
            from mistral_rerank.remote.reranker import RemoteReranker

            options = {name: getattr(self, name) for name in REMOTE}
            return RemoteReranker(self.model, headers=dict(self.headers), **options)
        from mistral_rerank.local.reranker import LocalReranker

        return LocalReranker(self.model or DEFAULT_MODEL, **{name: getattr(self, name) for name in LOCAL})

    def __getstate__(self) -> dict[Any, Any]:
        """Leave the key and the headers out of pickles; whoever opens one takes them from the environment."""
        state = super().__getstate__()
        return state | {"__dict__": state["__dict__"] | {"api_key": None, "headers": ()}}


LOCAL = (
    "base",
    "device",
    "dtype",
    "quantization",
    "max_length",
    "overflow",
    "batch_tokens",
    "share_batches",
    "cascade_depth",
    "cache_size",
)
REMOTE = (
    "base_url",
    "protocol",
    "api_key",
    "overflow",
    "timeout",
    "retries",
    "max_passages",
    "max_concurrency",
    "requests_per_minute",
    "score_unit",
)


def open_reranker(model: str | PathLike[str] | None = None, **settings: Any) -> Reranker:
    """Open a reranker.

        reranker = open_reranker("mini")
        reranker.rank("Who wrote Faust?", passages, top_n=3)

    Args:
        model: "mini", a checkpoint folder or a hub id, or with `backend="remote"` a name at the endpoint; None for
            the environment's choice, else "mini", or whatever the endpoint serves.
        settings: the other fields of `RerankSettings`.

    Raises:
        SettingsError: a setting is not known or does not fit.

    """
    return RerankSettings(**(settings if model is None else {"model": model, **settings})).open()


SECRETS = frozenset({"api_key", "api_keys", "headers"})


def describe(error: ValidationError, known: Collection[str] = (), from_environment: Collection[str] = ()) -> str:
    """Say in one line what is wrong with which setting.

    Args:
        error: pydantic's.
        known: the options that there are, to suggest one for a name that is not known.
        from_environment: the settings whose values came from environment variables.

    """
    problems = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] in {"extra_forbidden", "no_such_attribute"}:  # may be a key under a misspelled name
            problems.append(f"{name}: no such option{suggest(name, known)}")
            continue
        source = f" (from {ENV_PREFIX}{name.upper()})" if name in from_environment else ""
        given = "" if not SECRETS.isdisjoint(problem["loc"]) else f" (given: {problem['input']!r})"
        problems.append(f"{name}{source}: {problem['msg'][0].lower()}{problem['msg'][1:]}{given}")
    return "; ".join(problems)


def warn_of_unknown_variables(
    prefix: str, known: Collection[str], *, others: tuple[str, ...] = (), stacklevel: int = 2
) -> None:
    """Warn of environment variables that begin with `prefix` and name no setting.

    Args:
        prefix: such as `MISTRAL_RERANK_`.
        known: names of settings, in lower case, without the prefix.
        others: longer prefixes that are read elsewhere.
        stacklevel: where the warning points to; 1 is the caller.

    """
    for variable in sorted(os.environ):
        name = variable.removeprefix(prefix).lower()
        if not variable.startswith(prefix) or variable.startswith(others) or name in known:
            continue
        warnings.warn(
            f"the environment variable {variable} is not read{suggest(name, known)}", stacklevel=stacklevel + 1
        )


def _document(settings: type[RerankSettings]) -> None:
    """Give a class a docstring and a signature that `help` shows well: its own options first, with what they mean."""
    fields = settings.model_fields
    names = sorted(fields, key=lambda name: (fields[name].description is None, name in RerankSettings.model_fields))
    arguments = [f"    {name}: {fields[name].description}" for name in names if fields[name].description]
    head, raises, tail = inspect.cleandoc(settings.__doc__ or "").partition("\n\nRaises:")
    settings.__doc__ = "\n".join([head, "", "Args:", *arguments]) + raises + tail
    known = inspect.signature(settings).parameters
    settings.__signature__ = inspect.Signature(
        [known[name].replace(annotation=fields[name].annotation) for name in names]  # without its constraints
    )


_document(RerankSettings)
