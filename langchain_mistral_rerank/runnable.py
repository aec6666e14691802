"""`MistralRerank` as a Runnable: one traced run per call, with LangChain's batches, retries and fallbacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document
from langchain_core.runnables import Runnable
from langchain_core.runnables.config import (
    ensure_config,
    get_async_callback_manager_for_config,
    get_callback_manager_for_config,
)
from typing_extensions import TypedDict, override

from mistral_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from langchain_core.runnables import RunnableConfig

    from langchain_mistral_rerank.tracing import Run


class RerankRequest(TypedDict):
    """The input of the Runnable; other keys are ignored."""

    query: str
    documents: list[Document]


class RerankRunnable(Runnable[RerankRequest, list[Document]]):
    """Maps a query with documents to the ranked documents.

    Raises:
        InvalidInputError: from `invoke` and its variants: the input is no dictionary, or lacks a key.

    """

    def __init__(
        self,
        compress: Callable[[Iterable[Document], str, Run], list[Document]],
        acompress: Callable[[Iterable[Document], str, Run], Awaitable[list[Document]]],
        *,
        name: str,
    ) -> None:
        self.name = name
        self._compress, self._acompress = compress, acompress

    @override
    def invoke(self, input: RerankRequest, config: RunnableConfig | None = None, **_: Any) -> list[Document]:
        checked, known = _check(input), ensure_config(config)
        run = _run(known) | {"callbacks": get_callback_manager_for_config(known)}
        return self._compress(checked["documents"], checked["query"], run)

    @override
    async def ainvoke(self, input: RerankRequest, config: RunnableConfig | None = None, **_: Any) -> list[Document]:
        checked, known = _check(input), ensure_config(config)
        run = _run(known) | {"callbacks": get_async_callback_manager_for_config(known)}
        return await self._acompress(checked["documents"], checked["query"], run)


def _run(config: RunnableConfig) -> Run:
    return {"name": config.get("run_name"), "run_id": config.get("run_id")}


def _check(request: object) -> RerankRequest:
    if not isinstance(request, Mapping):
        raise InvalidInputError(f'expected {{"query": ..., "documents": [...]}}, got a {type(request).__name__}')
    missing = [key for key in ("query", "documents") if key not in request]
    if missing:
        keys = ", ".join(map(str, request)) or "none"
        raise InvalidInputError(
            f'the input lacks {" and ".join(missing)} (its keys: {keys}); give {{"query": ..., "documents": [...]}}'
        )
    return request  # type: ignore[return-value]
