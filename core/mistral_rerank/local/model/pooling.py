"""How a model reads a sequence, and what of it reaches the head."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolingConfig:
    """A checkpoint's attention and pooling.

    Attributes:
        bidirectional: whether a token sees those after it too.
        mean: whether the mean of all its hidden states is pooled, and not the last one.

    """

    bidirectional: bool = False
    mean: bool = False

    @property
    def shares(self) -> bool:
        """Whether sequences that begin alike may compute the beginning once."""
        return not (self.bidirectional or self.mean)


LAST_TOKEN = PoolingConfig()
"""As rerank-qa-mistral-4b reads: causal, last token."""
