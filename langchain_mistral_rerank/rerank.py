"""`MistralRerank`, a `BaseDocumentCompressor` that puts the documents that answer the query first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.load.serializable import Serializable
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from pydantic import ConfigDict, Field
from typing_extensions import override

from langchain_mistral_rerank.tracing import achild_run, child_run
from mistral_rerank.adapters import RerankOptions, check_items
from mistral_rerank.reranker import check_query

if TYPE_CHECKING:
    from langchain_core.callbacks import Callbacks

    from mistral_rerank import RankedPassage


class MistralRerank(RerankOptions, Serializable, BaseDocumentCompressor):
    """Reorders documents by how likely it is that they answer the query.

        compressor = MistralRerank(top_n=5)
        retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=retriever)

    Each returned document is a copy of an input document, of the same class and with the same id; its
    probability stands in `metadata["relevance_score"]`. The inputs are left as they are.
    """

    model_config = ConfigDict(extra="forbid")

    score_key: str = Field(default="relevance_score", description="where in the metadata the probability goes")
    metadata_keys: tuple[str, ...] = Field(
        default=(), description="metadata that the model reads before the text, as lines of `key: value`"
    )
    text_fn: Callable[[Document], str] | None = Field(
        default=None, exclude=True, description="what the model reads of a document, instead of its page_content"
    )
    trace_run_type: str = Field(
        default="chain", description="run type in traces; 'reranker' makes OpenInference's RERANKER span"
    )

    @override
    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        check_query(query)
        with child_run(callbacks, self, query, documents) as finish:
            ranking = self.rerank(query, documents)
            return finish(self._reordered(documents, ranking), ranking)

    @override
    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        check_query(query)
        async with achild_run(callbacks, self, query, documents) as finish:
            ranking = await self.arerank(query, documents)
            return finish(self._reordered(documents, ranking), ranking)

    def as_runnable(self) -> Runnable[dict[str, Any], list[Document]]:
        """Give a Runnable from {"query", "documents"} to documents, with batches, retries and fallbacks."""

        def run(request: dict[str, Any], config: RunnableConfig) -> list[Document]:
            return self.compress_documents(request["documents"], request["query"], config.get("callbacks"))

        async def arun(request: dict[str, Any], config: RunnableConfig) -> list[Document]:
            return await self.acompress_documents(request["documents"], request["query"], config.get("callbacks"))

        return RunnableLambda(run, arun, name=type(self).__name__)

    @classmethod
    @override
    def is_lc_serializable(cls) -> bool:
        return True

    @property
    @override
    def lc_secrets(self) -> dict[str, str]:
        return {"api_key": "MISTRAL_RERANK_API_KEY"}

    def _texts(self, items: Sequence[Document]) -> list[str]:
        check_items(items, Document, "wrap the text: Document(page_content=...)")
        return [self._text(document) for document in items]

    def _text(self, document: Document) -> str:
        text = document.page_content if self.text_fn is None else self.text_fn(document)
        lines = [f"{key}: {document.metadata[key]}" for key in self.metadata_keys if key in document.metadata]
        return "\n".join([*lines, text])

    def _reordered(self, documents: Sequence[Document], ranking: list[RankedPassage]) -> list[Document]:
        return [
            (document := documents[place.index]).model_copy(
                update={"metadata": deepcopy(document.metadata) | {self.score_key: place.score.probability}}
            )
            for place in ranking
        ]
