"""The settings of a reranker, shared by Python, the adapters and the command line.

A setting that is not given is read from the environment (`MISTRAL_RERANK_MODEL`, `MISTRAL_RERANK_DEVICE`, ...), so a
program moves to another model or device without a change of code.
"""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)

from mistral_rerank._options import plain, suggest
from mistral_rerank.errors import SettingsError
from mistral_rerank.reranker import Overflow, ProtocolName, Quantization, Unit

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from os import PathLike

    from mistral_rerank.reranker import Reranker

ENV_PREFIX = "MISTRAL_RERANK_"
OTHER_VARIABLES = ("api_key", "cache", "embeddings_api_key")
OTHER_PREFIXES = ("MISTRAL_RERANK_SERVER_", "MISTRAL_RERANK_CLUSTER_")
DEFAULT_MODEL = "mini"


def read_environment(prefix: str, names: Iterable[str]) -> dict[str, str]:
    """Give the settings that environment variables hold; an empty variable counts as unset."""
    return {name: value for name in names if (value := os.environ.get(prefix + name.upper()))}


def _pairs(value: object) -> object:
    """Turn a mapping, or a JSON object, into pairs, which are hashable as all settings are."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ValueError('not a JSON object like {"name": "value"}')
    return tuple((name, plain(each)) for name, each in value.items()) if isinstance(value, Mapping) else value


Headers = Annotated[tuple[tuple[str, SecretStr], ...], BeforeValidator(_pairs)]
Adapters = Annotated[tuple[tuple[str, str], ...], BeforeValidator(_pairs)]


class RerankSettings(BaseModel):
    """Which model, where it runs, and how it treats long passages.

    `backend` selects this machine or an endpoint; settings of the other one are ignored. Paths, numpy numbers,
    `torch.device` and `torch.dtype` are accepted in place of strings and numbers.

    Raises:
        SettingsError: an option is unknown, or a value is invalid; also on assignment.

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
        None,
        description="mini (local default), a checkpoint folder or GGUF file, a hub id[@REVISION], or a name at the "
        "endpoint",
    )
    base: str | None = Field(
        None, description="base of the adapter, if it was trained on a folder: that folder, or a hub id"
    )
    adapters: Adapters = Field(
        (),
        description='LoRA adapters that share the weights; from the environment as JSON: {"name": "folder or hub id"}',
    )
    rerank_config: str | None = Field(
        None, description="how to read a checkpoint that does not say: a known family, or a file like rerank.json"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps, or several: cuda:0,cuda:1")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the weights; auto is bfloat16 where the hardware multiplies it"
    )
    quantization: Quantization | None = Field(
        None, description="int8: faster on a CPU with VNNI instructions; nf4: weights in 4 bits; other scores"
    )
    max_length: int | None = Field(None, ge=8, description="most tokens of a pair; default: the checkpoint's")
    overflow: Overflow = Field("truncate", description="treatment of a passage over max_length")
    instruction: str | None = Field(None, description="what counts as relevant, for models that take an instruction")
    batch_tokens: int | None = Field(None, ge=1, description="most tokens of a batch")
    share_batches: bool | None = Field(
        None, description="whether concurrent calls may share batches; default: only on accelerators"
    )
    cascade_depth: int | None = Field(
        None, ge=1, description="passages of a question that reach the second pass; the lower layers select them"
    )
    cache_size: int = Field(0, ge=0, description="pairs whose scores are cached")
    passage_cache: ByteSize = Field(
        ByteSize(0), description="memory for keys and values of passages that come back, such as 1GiB; 0 for none"
    )
    prepared_passages: str | None = Field(
        None, description="folder that `mistral-rerank prepare` wrote, whose passages are not computed"
    )
    base_url: str | None = Field(None, description="URL of the endpoint; default: the vendor's")
    protocol: Literal["auto", ProtocolName] = Field("auto", description="protocol of the endpoint; auto detects it")
    api_key: SecretStr | None = Field(
        None,
        exclude=True,
        description="default: MISTRAL_RERANK_API_KEY, or the variable of the vendor's host, such as NVIDIA_API_KEY",
    )
    headers: Headers = Field(
        (),
        exclude=True,
        description='sent to base_url with every request; from the environment as JSON, like {"api-key": "..."}',
    )
    timeout: float = Field(120.0, gt=0, description="seconds of a remote call in total")
    retries: int = Field(2, ge=0, description="retries of a failed request")
    max_passages: int | None = Field(
        None, ge=1, description="most passages of a request; default: the protocol's limit"
    )
    max_concurrency: int = Field(8, ge=1, description="most concurrent requests of one call")
    requests_per_minute: float | None = Field(None, gt=0, description="most requests per minute")
    score_unit: Literal["auto", Unit] = Field(
        "auto", description="unit of the endpoint's scores; auto: that of its protocol"
    )

    if not TYPE_CHECKING:  # type checkers read the fields

        def __init__(self, /, **given: Any) -> None:
            known = type(self).model_fields
            from_environment = read_environment(ENV_PREFIX, RerankSettings.model_fields.keys() - {"api_key", *given})
            try:
                super().__init__(**from_environment, **given)
            except ValidationError as error:
                raise SettingsError(describe(error, known, from_environment)) from error
            variables = {*RerankSettings.model_fields, *OTHER_VARIABLES}
            warn_of_unknown_variables(ENV_PREFIX, variables, others=OTHER_PREFIXES)
            if "backend" not in self.model_fields_set:
                self._warn_of_unused_endpoint()

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

    def _warn_of_unused_endpoint(self) -> None:
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
        """The model's name; where none is set, the default model or the endpoint."""
        return self.model or (DEFAULT_MODEL if self.backend == "local" else self.base_url or self.protocol)

    def open(self) -> Reranker:
        """Make the reranker of these settings. Its first use loads the model, or sends the first request.

        Raises:
            SettingsError: this machine has no such device, or the base URL is invalid.
            MissingDependencyError: the extra `local` is not installed.

        """
        if self.backend == "remote":
            from mistral_rerank.remote.reranker import RemoteReranker

            options = {name: getattr(self, name) for name in REMOTE}
            return RemoteReranker(self.model, headers=dict(self.headers), **options)
        from mistral_rerank.local.reranker import LocalReranker

        options = {name: getattr(self, name) for name in LOCAL}
        return LocalReranker(self.model or DEFAULT_MODEL, **options | {"adapters": dict(self.adapters)})

    def __getstate__(self) -> dict[Any, Any]:
        """Leave the key and the headers out of pickles; after unpickling they come from the environment."""
        state = super().__getstate__()
        return state | {"__dict__": state["__dict__"] | {"api_key": None, "headers": ()}}


LOCAL = (
    "base",
    "adapters",
    "rerank_config",
    "device",
    "dtype",
    "quantization",
    "max_length",
    "overflow",
    "instruction",
    "batch_tokens",
    "share_batches",
    "cascade_depth",
    "cache_size",
    "passage_cache",
    "prepared_passages",
)
REMOTE = (
    "base_url",
    "protocol",
    "api_key",
    "overflow",
    "instruction",
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
            `MISTRAL_RERANK_MODEL`, or else "mini", or the model that the endpoint serves.
        settings: the other fields of `RerankSettings`.

    Raises:
        SettingsError: a setting is unknown or invalid.

    """
    return RerankSettings(**(settings if model is None else {"model": model, **settings})).open()


SECRETS = frozenset({"api_key", "api_keys", "headers"})


def describe(error: ValidationError, known: Collection[str] = (), from_environment: Collection[str] = ()) -> str:
    """Describe the invalid settings in one line; `known` holds the names to suggest for an unknown one."""
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
    """Warn about environment variables that begin with `prefix`, not with `others`, and name no setting."""
    for variable in sorted(os.environ):
        name = variable.removeprefix(prefix).lower()
        if not variable.startswith(prefix) or variable.startswith(others) or name in known:
            continue
        warnings.warn(
            f"the environment variable {variable} is not read{suggest(name, known)}", stacklevel=stacklevel + 1
        )


def _document(settings: type[RerankSettings]) -> None:
    """Set the docstring and the signature of a class for `help`: its own options first, each with its description."""
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
