"""An embedding model as a reranker: the baseline for a cross-encoder on the same candidates."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mistral_rerank.errors import InvalidInputError
from mistral_rerank.reranker import Overflow, Pair, Reranker, Score, check_pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from mistral_rerank.evaluation.encoders import Encoder, Kind


class BiEncoderReranker(Reranker):
    """Scores a pair by the dot product of its embeddings; long texts are truncated to the model's limit.

    Embeddings are cached in memory, so a passage of many questions is encoded once. The probability is the sigmoid of
    the product, and not calibrated.

    Args:
        name: the model name in reports.
        encoder: embeds questions and passages.

    """

    def __init__(self, name: str, encoder: Encoder) -> None:
        self._name, self._encoder = name, encoder
        self._vectors: dict[tuple[Kind, str], NDArray[np.float32]] = {}

    @property
    def model_name(self) -> str:
        """See `Reranker.model_name`."""
        return self._name

    def score_pairs(
        self,
        pairs: Sequence[Pair],
        *,
        overflow: Overflow | None = None,  # noqa: ARG002
        instruction: str | None = None,
    ) -> list[Score]:
        """See `Reranker.score_pairs`."""
        if instruction is not None:
            raise InvalidInputError("a bi-encoder has no place for an instruction; leave it out")
        pairs = check_pairs(pairs)
        self._encode("query", [query for query, _ in pairs])
        self._encode("passage", [passage for _, passage in pairs])
        return [
            Score.from_logit(float(self._vectors["query", query] @ self._vectors["passage", passage]))
            for query, passage in pairs
        ]

    async def ascore_pairs(
        self, pairs: Sequence[Pair], *, overflow: Overflow | None = None, instruction: str | None = None
    ) -> list[Score]:
        """See `Reranker.ascore_pairs`."""
        return await asyncio.to_thread(self.score_pairs, pairs, overflow=overflow, instruction=instruction)

    def _encode(self, kind: Kind, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if (kind, text) not in self._vectors]
        if new:
            vectors = self._encoder.encode(new, kind, progress=lambda _: None)
            self._vectors.update(zip(((kind, text) for text in new), vectors, strict=True))
