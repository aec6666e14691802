"""`MistralRerank`, a `BaseDocumentCompressor` that puts the documents that answer the query first."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import Field
from typing_extensions import override

from mistral_rerank.adapters import RerankOptions, check_items

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_core.callbacks import Callbacks

    from mistral_rerank import RankedPassage


class MistralRerank(RerankOptions, BaseDocumentCompressor):
    """Reorders documents by how likely it is that they answer the query.

        compressor = MistralRerank(top_n=5)
        retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=retriever)

    Each returned document is a copy of an input document, of the same class and with the same id; its
    probability stands in `metadata["relevance_score"]`. The inputs are left as they are.
    """

    score_key: str = Field(default="relevance_score", description="where in the metadata the probability goes")

    @override
    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        return self._reordered(documents, self.ranked(query, self._texts(documents)))

    @override
    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        return self._reordered(documents, await self.aranked(query, self._texts(documents)))

    def _texts(self, documents: Sequence[Document]) -> list[str]:
        check_items(documents, Document, "wrap the text: Document(page_content=...)")
        return [document.page_content for document in documents]

    def _reordered(self, documents: Sequence[Document], ranking: list[RankedPassage]) -> list[Document]:
        return [
            (document := documents[place.index]).model_copy(
                update={"metadata": deepcopy(document.metadata) | {self.score_key: place.score.probability}}
            )
            for place in ranking
        ]
