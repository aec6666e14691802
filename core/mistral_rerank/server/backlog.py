"""The work of the admitted requests, in tokens, and how long it takes: for `Retry-After`, and for deadlines.

Tokens are estimated from characters, since texts are tokenized only after admission.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mistral_rerank.scores import Pair

CHARACTERS = 4
"""Characters of a token, on average."""
LONGEST_PAIR = 8192
"""Most tokens of a pair, where the reranker names no limit."""
MEMORY = 0.9
"""Weight of the earlier batches in the speed, after each batch."""
FEWEST_TOKENS = 1000
"""Tokens in the earlier batches below which the speed is unknown: the first batches are short and slow."""
LONGEST_RETRY = 60
"""The largest `Retry-After`, in seconds."""


class Backlog:
    """Tokens of the requests that wait or run, and the speed of the model.

    Attributes:
        tokens: estimated tokens of all requests.

    Args:
        longest_pair: most tokens of a pair; None if unknown.

    """

    def __init__(self, longest_pair: int | None = None) -> None:
        self.tokens = 0
        self._longest = longest_pair or LONGEST_PAIR
        self._requests: dict[object, int] = {}
        self._computed, self._seconds = 0.0, 0.0

    def ran_batch(self, tokens: int, seconds: float) -> None:
        """Note the speed of a batch."""
        self._computed = MEMORY * self._computed + tokens
        self._seconds = MEMORY * self._seconds + seconds

    def estimate(self, pairs: Iterable[Pair]) -> int:
        """Estimate the tokens of pairs, each at most the limit."""
        return sum(
            min(self._longest, 1 + (len(query) + len(passage)) // CHARACTERS) for query, passage in pairs if passage
        )

    @contextmanager
    def holding(self, tokens: int) -> Iterator[None]:
        """Count the tokens of a request while it waits or runs."""
        request = object()
        self._requests[request] = tokens
        self.tokens += tokens
        try:
            yield
        finally:
            self.tokens -= self._requests.pop(request)

    def _seconds_of(self, tokens: int) -> float:
        """Estimate the time of so many tokens; 0 while the speed is unknown."""
        return tokens * self._seconds / self._computed if self._computed >= FEWEST_TOKENS else 0.0

    def seconds_until_answer(self, tokens: int) -> float:
        """Estimate the time until another request is answered, with requests computed in turn.

        Until then each other request computes at most as many tokens as this one.
        """
        if not self._requests:
            return 0.0  # the server is idle: nothing is gained by refusing
        return self._seconds_of(tokens + sum(min(tokens, other) for other in self._requests.values()))

    def retry_after(self) -> int:
        """Give the `Retry-After` of a refusal: when the work that waits now is done."""
        return max(1, min(LONGEST_RETRY, math.ceil(self._seconds_of(self.tokens))))
