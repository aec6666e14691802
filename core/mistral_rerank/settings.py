"""Every choice a user makes about a reranker, in one place for Python, the adapters and the command line.

A setting that is not given is looked up in the environment (`MISTRAL_RERANK_MODEL`, `MISTRAL_RERANK_DEVICE`, ...),
so a program moves to another model or device without a change of code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from mistral_rerank.errors import SettingsError
from mistral_rerank.reranker import Overflow, Quantization

if TYPE_CHECKING:
    from mistral_rerank.reranker import Reranker

ENV_PREFIX = "MISTRAL_RERANK_"
DEFAULT_MODEL = "mini"


def environment_field(variable: str, default: object, description: str, **constraints: Any) -> Any:
    """Declare a field whose default comes from the environment, read anew for each instance."""
    return Field(
        default_factory=lambda: os.environ.get(variable) or default,
        validate_default=True,
        description=description,
        **constraints,
    )


def _setting(name: str, default: object, description: str, **constraints: Any) -> Any:
    return environment_field(ENV_PREFIX + name.upper(), default, description, **constraints)


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
    """

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        protected_namespaces=(),
        hide_input_in_errors=True,  # a key under a misspelled name
    )

    backend: Literal["local", "remote"] = _setting("backend", "local", "this machine, or an HTTP endpoint")
    model: str | None = _setting(
        "model", None, "mini (local default), a checkpoint folder, a hub id, or a name at the endpoint"
    )
    base: str | None = _setting(
        "base", None, "under an adapter that was trained on a folder: that folder, or a hub id"
    )
    device: str = _setting("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "dtype", "auto", "auto is bfloat16 where the hardware multiplies it"
    )
    quantization: Quantization | None = _setting(
        "quantization", None, "int8: faster on a CPU with VNNI instructions; nf4: weights in 4 bits; other scores"
    )
    max_length: int | None = _setting("max_length", None, "most tokens of a pair; default: the checkpoint's", ge=8)
    overflow: Overflow = _setting("overflow", "truncate", "what happens to a passage over the limit")
    batch_tokens: int | None = _setting("batch_tokens", None, "most tokens that a batch computes", ge=1)
    share_batches: bool | None = _setting(
        "share_batches", None, "whether concurrent calls may share batches; default: on accelerators"
    )
    contenders: int | None = _setting(
        "contenders", None, "passages of a question that are read to the end, chosen by the lower layers", ge=1
    )
    cache_size: int = _setting("cache_size", 0, "pairs whose scores are kept for the next time", ge=0)
    base_url: str | None = _setting("base_url", None, "the endpoint's; default: the vendor's own")
    protocol: Literal["auto", "nvidia", "cohere", "jina", "vllm", "tei", "voyage"] = _setting(
        "protocol", "auto", "the contract that the endpoint speaks; auto finds out"
    )
    api_key: SecretStr | None = Field(
        default=None,
        exclude=True,
        description="default: MISTRAL_RERANK_API_KEY; at a vendor's hosts its variable, such as NVIDIA_API_KEY",
    )
    headers: Headers = Field(
        default_factory=lambda: os.environ.get(ENV_PREFIX + "HEADERS") or (),
        validate_default=True,
        exclude=True,
        description='sent to base_url with every request; from the environment as JSON, like {"api-key": "..."}',
    )
    timeout: float = _setting("timeout", 120.0, "seconds that a remote call may take in all", gt=0)
    retries: int = _setting("retries", 2, "how often a failed request is sent again", ge=0)
    max_passages: int | None = _setting("max_passages", None, "most passages of a request; default: as allowed", ge=1)
    max_concurrency: int = _setting("max_concurrency", 8, "most requests of one call at once", ge=1)
    requests_per_minute: float | None = _setting("requests_per_minute", None, "most requests a minute", gt=0)
    score_unit: Literal["auto", "logit", "probability"] = _setting(
        "score_unit", "auto", "what the endpoint's scores are; auto goes by its contract"
    )

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
    "contenders",
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


def open_reranker(model: str | None = None, **settings: Any) -> Reranker:
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
    given = settings if model is None else {"model": model, **settings}
    try:
        return RerankSettings(**given).open()
    except ValidationError as error:
        raise SettingsError(describe(error)) from error


SECRETS = frozenset({"api_key", "api_keys", "headers"})


def describe(error: ValidationError) -> str:
    """Say in one line what is wrong with which setting."""
    problems = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"])
        may_be_secret = problem["type"] == "extra_forbidden" or not SECRETS.isdisjoint(problem["loc"])
        given = "" if may_be_secret else f" (given: {problem['input']!r})"
        problems.append(f"{name}: {problem['msg'][0].lower()}{problem['msg'][1:]}{given}")
    return "; ".join(problems)
