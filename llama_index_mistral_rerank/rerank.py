"""`MistralRerank`, a node postprocessor that puts the nodes that answer the query first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from pydantic import Field
from typing_extensions import override

from mistral_rerank.adapters import RerankOptions, check_items
from mistral_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from mistral_rerank import RankedPassage


class MistralRerank(RerankOptions, BaseNodePostprocessor):
    """Reorders nodes by how likely it is that they answer the query.

        engine = index.as_query_engine(similarity_top_k=20, node_postprocessors=[MistralRerank(top_n=5)])

    Each returned `NodeWithScore` is new; it holds the input's node, untouched, and its probability as `score`.
    """

    metadata_mode: MetadataMode = Field(
        default=MetadataMode.EMBED, description="which metadata the model reads with the text"
    )

    @classmethod
    @override
    def class_name(cls) -> str:
        return "MistralRerank"

    @override
    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return _reordered(nodes, self.ranked(_query(query_bundle), self._texts(nodes)))

    @override
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return _reordered(nodes, await self.aranked(_query(query_bundle), self._texts(nodes)))

    def _texts(self, nodes: list[NodeWithScore]) -> list[str]:
        check_items(nodes, NodeWithScore, "wrap the node: NodeWithScore(node=...)")
        return [node.node.get_content(metadata_mode=self.metadata_mode) for node in nodes]


def _query(query_bundle: QueryBundle | None) -> str:
    if query_bundle is None or not query_bundle.query_str.strip():
        raise InvalidInputError("reranking needs a query; pass query_str='...' or a QueryBundle with text")
    return query_bundle.query_str


def _reordered(nodes: list[NodeWithScore], ranking: list[RankedPassage]) -> list[NodeWithScore]:
    return [NodeWithScore(node=nodes[place.index].node, score=place.score.probability) for place in ranking]
