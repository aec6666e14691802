"""One run of a reranker in LangChain's traces, under the run that called it."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TypedDict

from langchain_core.callbacks import AsyncCallbackManager, CallbackManager

from mistral_rerank._telemetry import request_attributes, result_attributes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from uuid import UUID

    from langchain_core.callbacks import Callbacks
    from langchain_core.documents import Document

    from langchain_mistral_rerank.rerank import MistralRerank
    from mistral_rerank import RankedPassage

    Finish = Callable[[list[Document], list[RankedPassage]], list[Document]]


class Run(TypedDict, total=False):
    """The parent's callbacks, and the name and id of a run if they are not the defaults."""

    callbacks: Callbacks
    name: str | None
    run_id: UUID | None


class _Call:
    """The inputs and outputs of a call, in the form of LangChain and OpenInference."""

    def __init__(self, compressor: MistralRerank, query: str, documents: Sequence[Document]) -> None:
        self.outputs: dict[str, Any] = {"documents": []}
        self._compressor, self._query, self._documents = compressor, query, documents
        self._ranking: list[RankedPassage] = []

    def start(self, run: Run) -> dict[str, Any]:
        """Give the arguments of `on_chain_start`."""
        compressor = self._compressor
        facts = {"model": compressor.used_model, "top_n": compressor.top_n}
        return {
            "serialized": None,
            "inputs": {"query": self._query, "documents": list(self._documents), **facts},
            "name": run.get("name") or type(compressor).__name__,
            "run_id": run.get("run_id"),
            "run_type": compressor.trace_run_type,
        }

    def finish(self, documents: list[Document], ranking: list[RankedPassage]) -> list[Document]:
        self.outputs, self._ranking = {"documents": documents}, ranking
        return documents

    def annotate(self, run_id: UUID) -> None:
        """Set `reranker.*` attributes on OpenInference's span of this run, if its instrumentor is active."""
        module = sys.modules.get("openinference.instrumentation.langchain")
        if module is None or not (instrumentor := module.LangChainInstrumentor()).is_instrumented_by_opentelemetry:
            return
        if span := instrumentor.get_span(run_id):
            compressor = self._compressor
            texts = [document.page_content for document in self._documents]
            inputs = request_attributes(self._query, texts, model=compressor.used_model, top_n=compressor.top_n)
            span.set_attributes(inputs | result_attributes(self._ranking))


@contextmanager
def child_run(run: Run, compressor: MistralRerank, query: str, documents: Sequence[Document]) -> Iterator[Finish]:
    """Trace one call; an exception ends the run as an error.

    Yields:
        A function that records the documents and the ranking, and returns the documents.

    """
    call = _Call(compressor, query, documents)
    manager = CallbackManager.configure(inheritable_callbacks=run.get("callbacks"))
    started = manager.on_chain_start(**call.start(run))
    try:
        yield call.finish
    except BaseException as error:
        call.annotate(started.run_id)
        started.on_chain_error(error)
        raise
    call.annotate(started.run_id)
    started.on_chain_end(call.outputs)


@asynccontextmanager
async def achild_run(
    run: Run, compressor: MistralRerank, query: str, documents: Sequence[Document]
) -> AsyncIterator[Finish]:
    """`child_run` with asynchronous callbacks; cancellation ends the run as an error too."""
    call = _Call(compressor, query, documents)
    manager = AsyncCallbackManager.configure(inheritable_callbacks=run.get("callbacks"))
    started = await manager.on_chain_start(**call.start(run))
    try:
        yield call.finish
    except BaseException as error:
        call.annotate(started.run_id)
        await started.on_chain_error(error)
        raise
    call.annotate(started.run_id)
    await started.on_chain_end(call.outputs)
