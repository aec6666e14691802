"""`MistralRerank`, a `BaseDocumentCompressor` that puts the documents that answer the query first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.load.serializable import Serializable
from pydantic import ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema
from typing_extensions import override

from langchain_mistral_rerank.runnable import RerankRunnable
from langchain_mistral_rerank.tracing import achild_run, child_run
from mistral_rerank.adapters import RerankOptions, copy_metadata
from mistral_rerank.errors import SettingsError
from mistral_rerank.settings import RerankSettings

if TYPE_CHECKING:
    from langchain_core.callbacks import Callbacks
    from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented

    from langchain_mistral_rerank.tracing import Run
    from mistral_rerank import RankedPassage


class MistralRerank(RerankOptions, Serializable, BaseDocumentCompressor):
    """Reorders documents by how likely it is that they answer the query.

        compressor = MistralRerank(top_n=5)
        retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=retriever)

    Each returned document is a copy of an input document, of the same class and with the same id; its
    probability stands in `metadata["relevance_score"]`. The inputs are left as they are.

    Raises:
        SettingsError: an option is not known, or a value does not fit; also on assignment.

    """

    model_config = ConfigDict(extra="forbid")

    _item: ClassVar[type] = Document
    _how_to_wrap: ClassVar[str] = "wrap the text: Document(page_content=...)"

    score_key: str = Field(default="relevance_score", description="where in the metadata the probability goes")
    metadata_keys: tuple[str, ...] = Field(
        default=(), description="metadata that the model reads before the text, as lines of `key: value`"
    )
    text_fn: Annotated[Callable[[Document], str] | None, SkipJsonSchema()] = Field(
        default=None, exclude=True, description="what the model reads of a document, instead of its page_content"
    )
    trace_run_type: str = Field(
        default="chain", description="run type in traces; 'reranker' makes OpenInference's RERANKER span"
    )

    @override
    def compress_documents(
        self, documents: Iterable[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Put the documents that answer the query first, and keep `top_n` of them.

        Args:
            documents: what a retriever found.
            query: the question.
            callbacks: of the caller's run; this call becomes a run under it.

        Returns:
            Copies of the documents, best first, with their probability in the metadata.

        Raises:
            InvalidInputError: the query is blank, a document is no Document, or `text_fn` gave no text.
            RerankError: one of its kinds, where the model or the endpoint fails.

        """
        return self._compress(documents, query, {"callbacks": callbacks})

    @override
    async def acompress_documents(
        self, documents: Iterable[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """`compress_documents` without blocking the event loop."""
        return await self._acompress(documents, query, {"callbacks": callbacks})

    def as_runnable(self) -> RerankRunnable:
        """Give a Runnable from {"query", "documents"} to documents, with batches, retries and fallbacks."""
        return RerankRunnable(self._compress, self._acompress, name=type(self).__name__)

    @classmethod
    @override
    def is_lc_serializable(cls) -> bool:
        return True

    @property
    @override
    def lc_secrets(self) -> dict[str, str]:
        return {"api_key": "MISTRAL_RERANK_API_KEY"}

    @property
    @override
    def lc_attributes(self) -> dict[str, Any]:
        """Name what was given or came from the environment, so that another environment does not change it."""
        chosen = self.model_fields_set & RerankSettings.model_fields.keys() - {"api_key"}
        return {name: getattr(self, name) for name in sorted(chosen)}

    @override
    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """Give what LangChain's `dumps` writes.

        Raises:
            SettingsError: it would lose a `reranker` or a `text_fn`.

        """
        self._check_dump()
        if self.text_fn is not None:
            raise SettingsError("text_fn cannot be serialized; use metadata_keys, or set it again after loading")
        return super().to_json()

    def _compress(self, documents: Iterable[Document], query: str, run: Run) -> list[Document]:
        found = self._checked(query, documents, "compress_documents(documents, query)")
        with child_run(run, self, query, found) as finish:
            ranking = self.rerank(query, found)
            return finish(self._reordered(found, ranking), ranking)

    async def _acompress(self, documents: Iterable[Document], query: str, run: Run) -> list[Document]:
        found = self._checked(query, documents, "acompress_documents(documents, query)")
        async with achild_run(run, self, query, found) as finish:
            ranking = await self.arerank(query, found)
            return finish(self._reordered(found, ranking), ranking)

    @override
    def _text(self, item: Document) -> str:
        text = item.page_content if self.text_fn is None else self.text_fn(item)
        lines = [f"{key}: {item.metadata[key]}" for key in self.metadata_keys if key in item.metadata]
        return "\n".join([*lines, text]) if lines and isinstance(text, str) else text

    def _reordered(self, documents: Sequence[Document], ranking: list[RankedPassage]) -> list[Document]:
        return [
            (document := documents[place.index]).model_copy(
                update={"metadata": copy_metadata(document.metadata) | {self.score_key: place.score.probability}}
            )
            for place in ranking
        ]
