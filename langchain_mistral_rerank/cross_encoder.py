"""`MistralCrossEncoder`, a `BaseCrossEncoder` for `CrossEncoderReranker` and other users of that class."""

from __future__ import annotations

from langchain_core.cross_encoders import BaseCrossEncoder
from typing_extensions import override

from mistral_rerank._holder import RerankerHolder


class MistralCrossEncoder(RerankerHolder, BaseCrossEncoder):
    """Scores (query, text) pairs with the probability that the text answers the query.

    CrossEncoderReranker(model=MistralCrossEncoder(), top_n=5)
    """

    @override
    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Give a probability for each (query, text), in input order.

        Raises:
            InvalidInputError: a text is not a string, or a query is blank.

        """
        pairs = list(text_pairs)
        return [score.probability for score in self.use().score_pairs(pairs, **self._adapter)] if pairs else []
