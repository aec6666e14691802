"""`MistralRerank`, a `BaseDocumentCompressor` that reranks documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.load.serializable import Serializable
from pydantic import ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema
from typing_extensions import override

from langchain_mistral_rerank.runnable import RerankRunnable
from mistral_rerank.adapters import ADDED_METADATA, RerankOptions, copy_metadata
from mistral_rerank.errors import SettingsError
from mistral_rerank.settings import SECRETS, RerankSettings

if TYPE_CHECKING:
    from langchain_core.callbacks import Callbacks
    from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented

    from mistral_rerank.scores import RankedPassage, Ranking


class MistralRerank(RerankOptions, Serializable, BaseDocumentCompressor):
    """Reorders documents by how likely it is that they answer the query.

        compressor = MistralRerank(top_n=5)
        retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=retriever)

    Each returned document is a copy of an input document, of the same class and with the same id; its
    probability is in `metadata["relevance_score"]`. The inputs are not changed.

    Raises:
        SettingsError: an option is unknown, or a value is invalid; also on assignment.

    """

    model_config = ConfigDict(extra="forbid")

    _item: ClassVar[type] = Document
    _how_to_wrap: ClassVar[str] = "wrap the text: Document(page_content=...)"

    score_key: str = Field(default="relevance_score", description="metadata key of the probability")
    metadata_keys: tuple[str, ...] = Field(
        default=(), description="metadata that precedes the text for the model, as lines of `key: value`"
    )
    text_fn: Annotated[Callable[[Document], str] | None, SkipJsonSchema()] = Field(
        default=None,
        exclude=True,
        description="gives the text of a document for the model, instead of its page_content",
    )
    retriever_score_key: str = Field(
        default="score", description="metadata key of the retriever's score, for retriever_weight; higher is better"
    )
    trace_run_type: str = Field(
        default="chain", description="run type in traces; 'reranker' makes OpenInference's RERANKER span"
    )

    @override
    def compress_documents(
        self, documents: Iterable[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Rank documents by the probability that they answer the query; keep `top_n` of them.

        Args:
            documents: from a retriever.
            query: the question.
            callbacks: of the caller's run; this call becomes a run under it.

        Returns:
            Copies of the documents, best first, with their probability in the metadata.

        Raises:
            InvalidInputError: the query is blank, a document is no Document, or `text_fn` returned no text.
            RerankError: from the model or the endpoint.

        """
        request: Any = {"query": query, "documents": documents}
        return self.as_runnable().invoke(request, {"callbacks": callbacks})

    @override
    async def acompress_documents(
        self, documents: Iterable[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """`compress_documents` without blocking the event loop."""
        request: Any = {"query": query, "documents": documents}
        return await self.as_runnable().ainvoke(request, {"callbacks": callbacks})

    def as_runnable(self) -> RerankRunnable:
        """Give a Runnable from {"query", "documents"} to documents, with batches, retries and fallbacks."""
        return RerankRunnable(self)

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
        """Give the settings from arguments and the environment, so that another environment does not change them."""
        fields = self.model_fields_set & RerankSettings.model_fields.keys() - SECRETS
        return {name: getattr(self, name) for name in sorted(fields)}

    @override
    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """Serialize for LangChain's `dumps`.

        Raises:
            SettingsError: serialization would lose a `reranker` or a `text_fn`.

        """
        self._check_dump()
        if self.text_fn is not None:
            raise SettingsError("text_fn cannot be serialized; use metadata_keys, or set it again after loading")
        return super().to_json()

    @override
    def _text(self, item: Document) -> str:
        text = item.page_content if self.text_fn is None else self.text_fn(item)
        lines = [f"{key}: {item.metadata[key]}" for key in self.metadata_keys if key in item.metadata]
        return "\n".join([*lines, text]) if lines and isinstance(text, str) else text

    @override
    def _content(self, item: Document) -> str:
        return item.page_content

    @override
    def _retriever_score(self, item: Document) -> float | None:
        score = item.metadata.get(self.retriever_score_key)
        return float(score) if isinstance(score, Real) else None

    @override
    def _embedding(self, item: Document) -> list[float] | None:
        return None  # documents hold none

    def _reordered(self, documents: Sequence[Document], ranking: Ranking) -> list[Document]:
        return [
            (document := documents[ranked.index]).model_copy(
                update={"metadata": copy_metadata(_original(document.metadata)) | self._result(ranking, ranked)}
            )
            for ranked in ranking
        ]

    def _result(self, ranking: Ranking, ranked: RankedPassage) -> dict[str, Any]:
        """Give what a result has in its metadata."""
        score = {self.score_key: ranked.score.probability} if ranking.error is None else {}
        return score | self._result_metadata(ranking, ranked)


def _original(metadata: dict[str, Any]) -> dict[str, Any]:
    """Leave out what an earlier reranker added, except its score."""
    return {key: value for key, value in metadata.items() if key not in ADDED_METADATA}
