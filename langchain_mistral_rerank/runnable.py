"""`MistralRerank` as a Runnable: one traced run per call, with LangChain's batches, retries and fallbacks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document
from langchain_core.messages.ai import UsageMetadata
from langchain_core.runnables import Runnable
from typing_extensions import TypedDict, override

from mistral_rerank._telemetry import request_attributes, result_attributes
from mistral_rerank.adapters import RERANK_ERROR
from mistral_rerank.errors import InvalidInputError
from mistral_rerank.scores import Ranking

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
    from langchain_core.runnables import RunnableConfig

    from langchain_mistral_rerank.rerank import MistralRerank
    from mistral_rerank._telemetry import Report


class RerankRequest(TypedDict):
    """The input of the Runnable; other keys are ignored."""

    query: str
    documents: list[Document]


class RerankRunnable(Runnable[RerankRequest, list[Document]]):
    """Maps a query with documents to the ranked documents.

    Raises:
        InvalidInputError: from `invoke` and its variants: the input is no dictionary, or lacks a key.

    """

    def __init__(self, compressor: MistralRerank) -> None:
        self.name = type(compressor).__name__
        self._compressor = compressor

    @override
    def invoke(self, input: RerankRequest, config: RunnableConfig | None = None, **_: Any) -> list[Document]:
        run_type = self._compressor.trace_run_type
        outputs: Any = self._call_with_config(self._rank, self._inputs(input), config, run_type=run_type)
        return outputs["documents"]  # type: ignore[no-any-return]

    @override
    async def ainvoke(self, input: RerankRequest, config: RunnableConfig | None = None, **_: Any) -> list[Document]:
        run_type = self._compressor.trace_run_type
        outputs: Any = await self._acall_with_config(
            self._arank, self._inputs(input, "acompress_documents"), config, run_type=run_type
        )
        return outputs["documents"]  # type: ignore[no-any-return]

    def _rank(self, inputs: Any, run_manager: CallbackManagerForChainRun) -> Any:
        with self._span(inputs, run_manager.run_id) as report:
            ranking = report(self._compressor.rerank(inputs["query"], inputs["documents"]))
        return self._outputs(inputs, ranking)

    async def _arank(self, inputs: Any, run_manager: AsyncCallbackManagerForChainRun) -> Any:
        with self._span(inputs, run_manager.run_id) as report:
            ranking = report(await self._compressor.arerank(inputs["query"], inputs["documents"]))
        return self._outputs(inputs, ranking)

    def _outputs(self, inputs: Any, ranking: Ranking) -> dict[str, Any]:
        """Give what a trace shows as the result."""
        outputs: dict[str, Any] = {"documents": self._compressor._reordered(inputs["documents"], ranking)}
        if ranking.error is not None:
            outputs[RERANK_ERROR] = type(ranking.error).__name__
        if tokens := ranking.usage.tokens:
            outputs["usage_metadata"] = UsageMetadata(input_tokens=tokens, output_tokens=0, total_tokens=tokens)
        return outputs

    def _inputs(self, request: object, method: str = "compress_documents") -> Any:
        """Validate the input, and add what a trace shows beside it."""
        if not isinstance(request, Mapping):
            raise InvalidInputError(f'expected {{"query": ..., "documents": [...]}}, got a {type(request).__name__}')
        missing = [key for key in ("query", "documents") if key not in request]
        if missing:
            keys = ", ".join(map(str, request)) or "none"
            raise InvalidInputError(
                f'the input lacks {" and ".join(missing)} (its keys: {keys}); give {{"query": ..., "documents": [...]}}'
            )
        compressor, query = self._compressor, request["query"]
        documents = compressor._checked(query, request["documents"], f"{method}(documents, query)")
        return {"query": query, "documents": documents, "model": compressor.used_model, "top_n": compressor.top_n}

    @contextmanager
    def _span(self, inputs: Any, run_id: UUID) -> Iterator[Report]:
        """Set `reranker.*` attributes on OpenInference's span of this run, if its instrumentor is active."""
        result = Ranking()

        def report(ranking: Ranking) -> Ranking:
            nonlocal result
            result = ranking
            return ranking

        try:
            yield report
        finally:
            module = sys.modules.get("openinference.instrumentation.langchain")
            instrumentor = module.LangChainInstrumentor() if module else None
            if (
                instrumentor is not None
                and instrumentor.is_instrumented_by_opentelemetry
                and (span := instrumentor.get_span(run_id))
            ):
                texts = [document.page_content for document in inputs["documents"]]
                attributes = request_attributes(inputs["query"], texts, model=inputs["model"], top_n=inputs["top_n"])
                span.set_attributes(attributes | result_attributes(result))
