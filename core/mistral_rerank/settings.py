"""Every choice a user makes about a reranker, in one place for Python, the adapters and the command line.

A setting that is not given is looked up in the environment (`MISTRAL_RERANK_MODEL`, `MISTRAL_RERANK_DEVICE`, ...),
so a program moves to another model or device without a change of code.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mistral_rerank.errors import SettingsError

if TYPE_CHECKING:
    from mistral_rerank.reranker import Reranker

ENV_PREFIX = "MISTRAL_RERANK_"


def _setting(name: str, default: object, description: str, **constraints: Any) -> Any:
    """Declare a field whose default comes from the environment, read anew for each instance."""
    return Field(
        default_factory=lambda: os.environ.get(ENV_PREFIX + name.upper()) or default,
        validate_default=True,
        description=description,
        **constraints,
    )


class RerankSettings(BaseModel):
    """Which model, where it runs, and how it reads long passages."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())

    model: str = _setting("model", "mini", "mini, a checkpoint folder or a hub id")
    device: str = _setting("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "dtype", "auto", "auto is bfloat16 where the hardware multiplies it"
    )
    max_length: int | None = _setting("max_length", None, "most tokens of a pair; default: the checkpoint's", ge=8)
    overflow: Literal["truncate", "chunk", "error"] = _setting(
        "overflow", "truncate", "what happens to a passage over the limit"
    )
    batch_tokens: int | None = _setting("batch_tokens", None, "most padded tokens of a batch", ge=1)
    share_batches: bool | None = _setting(
        "share_batches", None, "whether concurrent calls may share batches; default: on accelerators"
    )

    def open(self) -> Reranker:
        """Make the reranker that these settings describe; its model is loaded on first use.

        Raises:
            SettingsError: the device is not on this machine.
            MissingDependencyError: the extra `local` is not installed.

        """
        from mistral_rerank.local.reranker import LocalReranker

        return LocalReranker(**{name: getattr(self, name) for name in RerankSettings.model_fields})


def open_reranker(model: str | None = None, **settings: Any) -> Reranker:
    """Open a reranker.

        reranker = open_reranker("mini")
        reranker.rank("Who wrote Faust?", passages, top_n=3)

    Args:
        model: "mini", a checkpoint folder or a hub id; None for the environment's choice, else "mini".
        settings: the other fields of `RerankSettings`.

    Raises:
        SettingsError: a setting is not known or does not fit.

    """
    given = settings if model is None else {"model": model, **settings}
    try:
        return RerankSettings(**given).open()
    except ValidationError as error:
        raise SettingsError(describe(error)) from error


def describe(error: ValidationError) -> str:
    """Say in one line what is wrong with which setting."""
    problems = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"])
        problems.append(f"{name}: {problem['msg'][0].lower()}{problem['msg'][1:]} (given: {problem['input']!r})")
    return "; ".join(problems)
