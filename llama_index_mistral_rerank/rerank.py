"""`MistralRerank`, a node postprocessor that reranks nodes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]  # its __init__ lacks __all__
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from pydantic import Field
from typing_extensions import override

from mistral_rerank.adapters import ADDED_METADATA, RerankOptions, copy_metadata
from mistral_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mistral_rerank.scores import Ranking

RETRIEVAL_SCORE = "retrieval_score"

HIDDEN_METADATA = ADDED_METADATA | {RETRIEVAL_SCORE}
"""Metadata keys of results, which are hidden from embeddings and LLMs."""

dispatcher = get_dispatcher(__name__)


class MistralRerank(RerankOptions, BaseNodePostprocessor):
    """Reorders nodes by how likely it is that they answer the query.

        engine = index.as_query_engine(similarity_top_k=20, node_postprocessors=[MistralRerank(top_n=5)])

    Each returned `NodeWithScore` is new; it contains the unchanged node of the input, and its probability as `score`.
    A node without text comes last, with probability 0.

    Raises:
        SettingsError: an option is unknown, or a value is invalid; also on assignment.

    """

    _item: ClassVar[type] = NodeWithScore
    _how_to_wrap: ClassVar[str] = "wrap the node: NodeWithScore(node=...)"
    _not_compared: ClassVar[frozenset[str]] = frozenset({"callback_manager"})

    metadata_mode: MetadataMode = Field(
        default=MetadataMode.EMBED, description="the metadata that the model reads with the text"
    )
    keep_retrieval_score: bool = Field(
        default=False,
        description="return copies of the nodes with the retriever's score in metadata that models do not read",
    )

    @classmethod
    @override
    def class_name(cls) -> str:
        return "MistralRerank"

    @override
    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Give the options, without the key, for `from_dict`.

        Raises:
            SettingsError: serialization would lose a `reranker`.

        """
        self._check_dump()
        return super().to_dict(**kwargs)

    @override
    def postprocess_nodes(
        self, nodes: Iterable[NodeWithScore], query_bundle: QueryBundle | None = None, query_str: str | None = None
    ) -> list[NodeWithScore]:
        """Rank nodes by the probability that they answer the query; keep `top_n` of them.

        Args:
            nodes: from a retriever.
            query_bundle: the question; alternative to `query_str`.
            query_str: the question as a string.

        Returns:
            The nodes in new wrappers, best first, with their probability as `score`.

        Raises:
            InvalidInputError: there is no query or a blank one, or a node is no NodeWithScore.
            RerankError: from the model or the endpoint.

        """
        bundle = _bundle(nodes, query_bundle, query_str)
        return self._postprocess_nodes(self._checked(bundle.query_str, nodes, _CALL), bundle)

    @override
    async def apostprocess_nodes(
        self, nodes: Iterable[NodeWithScore], query_bundle: QueryBundle | None = None, query_str: str | None = None
    ) -> list[NodeWithScore]:
        """`postprocess_nodes` without blocking the event loop."""
        bundle = _bundle(nodes, query_bundle, query_str)
        return await self._apostprocess_nodes(self._checked(bundle.query_str, nodes, _CALL), bundle)

    @override
    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _with_text(query_bundle).query_str
        with self._events(query, nodes) as report:
            return report(self.rerank(query, nodes))

    @override
    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _with_text(query_bundle).query_str
        with self._events(query, nodes) as report:
            return report(await self.arerank(query, nodes))

    @contextmanager
    def _events(self, query: str, nodes: list[NodeWithScore]) -> Iterator[Callable[[Ranking], list[NodeWithScore]]]:
        """Emit LlamaIndex's events and callbacks of one call; every start event gets its end event.

        Yields a function that makes the result of a ranking.
        """
        top_n = len(nodes) if self.top_n is None else self.top_n
        reranked: list[NodeWithScore] = []
        dispatcher.event(ReRankStartEvent(query=query, nodes=nodes, top_n=top_n, model_name=self.used_model))
        payload: dict[str, object] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.used_model,
            EventPayload.QUERY_STR: query,
            EventPayload.TOP_K: top_n,
        }
        end: dict[str, object] = {EventPayload.NODES: reranked}
        tags: dict[str, object] = {}

        def report(ranking: Ranking) -> list[NodeWithScore]:
            reranked.extend(self._reordered(nodes, ranking))
            if ranking.error is not None:
                end[EventPayload.EXCEPTION] = ranking.error
            if ranking.usage.tokens:
                tags["total_tokens"] = ranking.usage.tokens
                end[EventPayload.ADDITIONAL_KWARGS] = tags
            return reranked

        try:
            with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
                yield report
                event.on_end(payload=end)
        finally:
            dispatcher.event(ReRankEndEvent(nodes=reranked, tags=tags))

    @override
    def _text(self, item: NodeWithScore) -> str:
        return _as_retrieved(item.node).get_content(metadata_mode=self.metadata_mode)

    @override
    def _content(self, item: NodeWithScore) -> str:
        return item.node.get_content(metadata_mode=MetadataMode.NONE)

    @override
    def _retriever_score(self, item: NodeWithScore) -> float | None:
        return item.score

    @override
    def _embedding(self, item: NodeWithScore) -> list[float] | None:
        return item.node.embedding

    def _reordered(self, nodes: list[NodeWithScore], ranking: Ranking) -> list[NodeWithScore]:
        reranked = []
        for ranked in ranking:
            item = nodes[ranked.index]
            added = {RETRIEVAL_SCORE: item.score} if self.keep_retrieval_score else {}
            added |= self._result_metadata(ranking, ranked)
            score = ranked.score.probability if ranking.error is None else item.score
            reranked.append(NodeWithScore(node=_with_metadata(item.node, added), score=score))
        return reranked


_CALL = "postprocess_nodes(nodes, query_str=...)"


def _bundle(nodes: object, bundle: object, text: object) -> QueryBundle:
    """Make a QueryBundle from either form of the query."""
    if bundle is not None and text is not None:
        raise InvalidInputError("give the query once, as query_str or as query_bundle")
    if text is None and isinstance(nodes, (str, QueryBundle)) and not isinstance(bundle, QueryBundle):
        raise InvalidInputError(f"query and nodes are swapped; call {_CALL}")
    if bundle is not None and not isinstance(bundle, QueryBundle):
        hint = "give a string as query_str=..." if isinstance(bundle, str) else f"call {_CALL}"
        raise InvalidInputError(f"query_bundle is a {type(bundle).__name__}, expected a QueryBundle; {hint}")
    return _with_text(QueryBundle(text) if isinstance(text, str) else bundle)


def _with_text(bundle: QueryBundle | None) -> QueryBundle:
    if bundle is None or not isinstance(bundle.query_str, str) or not bundle.query_str.strip():
        raise InvalidInputError("reranking needs a query; pass query_str='...' or a QueryBundle with text")
    return bundle


def _with_metadata(node: BaseNode, added: dict[str, Any]) -> BaseNode:
    """Copy a node with more metadata, hidden from embeddings and LLMs; without any the node itself."""
    node = _without_metadata(node, ADDED_METADATA | added.keys())
    if not added:
        return node
    return node.model_copy(
        update={
            "metadata": copy_metadata(node.metadata) | added,
            "excluded_embed_metadata_keys": [*node.excluded_embed_metadata_keys, *added],
            "excluded_llm_metadata_keys": [*node.excluded_llm_metadata_keys, *added],
        }
    )


def _as_retrieved(node: BaseNode) -> BaseNode:
    """Undo `_with_metadata`, so that a second postprocessor reads the same text as the first."""
    return _without_metadata(node, HIDDEN_METADATA)


def _without_metadata(node: BaseNode, names: frozenset[str]) -> BaseNode:
    """Copy a node without those of the keys that `_with_metadata` added; if it added none of them, the node itself."""
    added = names.intersection(node.excluded_embed_metadata_keys)
    if not added:
        return node
    return node.model_copy(
        update={
            "metadata": {key: value for key, value in node.metadata.items() if key not in added},
            "excluded_embed_metadata_keys": [key for key in node.excluded_embed_metadata_keys if key not in added],
            "excluded_llm_metadata_keys": [key for key in node.excluded_llm_metadata_keys if key not in added],
        }
    )
