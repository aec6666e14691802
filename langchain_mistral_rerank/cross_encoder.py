"""`MistralCrossEncoder`, for what takes LangChain's `BaseCrossEncoder`, such as `CrossEncoderReranker`."""

from __future__ import annotations

from langchain_core.cross_encoders import BaseCrossEncoder
from typing_extensions import override

from mistral_rerank.adapters import RerankerHolder


class MistralCrossEncoder(RerankerHolder, BaseCrossEncoder):
    """Scores (query, text) pairs with the probability that the text answers the query."""

    @override
    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        return [score.probability for score in self.use().score_pairs(text_pairs)] if text_pairs else []
