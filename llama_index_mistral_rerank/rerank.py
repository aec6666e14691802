"""`MistralRerank`, a node postprocessor that puts the nodes that answer the query first."""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING

from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]  # its __init__ lacks __all__
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from pydantic import Field
from typing_extensions import override

from mistral_rerank.adapters import RerankOptions, check_items
from mistral_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mistral_rerank import RankedPassage

RETRIEVAL_SCORE = "retrieval_score"

dispatcher = get_dispatcher(__name__)


class MistralRerank(RerankOptions, BaseNodePostprocessor):
    """Reorders nodes by how likely it is that they answer the query.

        engine = index.as_query_engine(similarity_top_k=20, node_postprocessors=[MistralRerank(top_n=5)])

    Each returned `NodeWithScore` is new; it holds the input's node, untouched, and its probability as `score`.
    A node without text is scored as an empty passage.
    """

    metadata_mode: MetadataMode = Field(
        default=MetadataMode.EMBED, description="which metadata the model reads with the text"
    )
    keep_retrieval_score: bool = Field(
        default=False,
        description="return copies of the nodes, with the retriever's score in their metadata, unseen by models",
    )

    @classmethod
    @override
    def class_name(cls) -> str:
        return "MistralRerank"

    @override
    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _query(query_bundle)
        with self._events(query, nodes) as found:
            found += self._reordered(nodes, self.rerank(query, nodes))
        return found

    @override
    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _query(query_bundle)
        with self._events(query, nodes) as found:
            found += self._reordered(nodes, await self.arerank(query, nodes))
        return found

    @contextmanager
    def _events(self, query: str, nodes: list[NodeWithScore]) -> Iterator[list[NodeWithScore]]:
        """Tell LlamaIndex's instrumentation and callbacks of one call; every start gets its end."""
        check_items(nodes, NodeWithScore, "wrap the node: NodeWithScore(node=...)")
        top_n = len(nodes) if self.top_n is None else self.top_n
        found: list[NodeWithScore] = []
        dispatcher.event(ReRankStartEvent(query=query, nodes=nodes, top_n=top_n, model_name=self.used_model))
        asked: dict[str, object] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.used_model,
            EventPayload.QUERY_STR: query,
            EventPayload.TOP_K: top_n,
        }
        try:
            with self.callback_manager.event(CBEventType.RERANKING, payload=asked) as event:
                yield found
                event.on_end(payload={EventPayload.NODES: found})
        finally:
            dispatcher.event(ReRankEndEvent(nodes=found))

    def _texts(self, items: Sequence[NodeWithScore]) -> list[str]:
        check_items(items, NodeWithScore, "wrap the node: NodeWithScore(node=...)")
        return [_as_retrieved(item.node).get_content(metadata_mode=self.metadata_mode) for item in items]

    def _reordered(self, nodes: list[NodeWithScore], ranking: list[RankedPassage]) -> list[NodeWithScore]:
        found = []
        for place in ranking:
            item = nodes[place.index]
            node = _with_retrieval_score(item) if self.keep_retrieval_score else item.node
            found.append(NodeWithScore(node=node, score=place.score.probability))
        return found


def _query(query_bundle: QueryBundle | None) -> str:
    if query_bundle is None or not query_bundle.query_str.strip():
        raise InvalidInputError("reranking needs a query; pass query_str='...' or a QueryBundle with text")
    return query_bundle.query_str


def _with_retrieval_score(item: NodeWithScore) -> BaseNode:
    """Copy a node, with the score in its metadata where neither an embedding nor an LLM reads it."""
    node = _as_retrieved(item.node)
    return node.model_copy(
        update={
            "metadata": deepcopy(node.metadata) | {RETRIEVAL_SCORE: item.score},
            "excluded_embed_metadata_keys": [*node.excluded_embed_metadata_keys, RETRIEVAL_SCORE],
            "excluded_llm_metadata_keys": [*node.excluded_llm_metadata_keys, RETRIEVAL_SCORE],
        }
    )


def _as_retrieved(node: BaseNode) -> BaseNode:
    """Take away what `_with_retrieval_score` added, so that a second pass reads what the first read."""
    if RETRIEVAL_SCORE not in node.excluded_embed_metadata_keys:
        return node
    return node.model_copy(
        update={
            "metadata": {key: value for key, value in node.metadata.items() if key != RETRIEVAL_SCORE},
            "excluded_embed_metadata_keys": [
                key for key in node.excluded_embed_metadata_keys if key != RETRIEVAL_SCORE
            ],
            "excluded_llm_metadata_keys": [key for key in node.excluded_llm_metadata_keys if key != RETRIEVAL_SCORE],
        }
    )
