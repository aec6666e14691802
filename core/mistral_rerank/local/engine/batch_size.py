"""The size of batches: reduced when memory runs out, and increased again later."""

FIRST_WAIT = 8
LONGEST_WAIT = 1024


class BatchSize:
    """The most tokens that a batch may compute.

    After `FIRST_WAIT` batches without an error the size doubles, up to the initial size. Each time that this was too
    early, the next wait doubles too, up to `LONGEST_WAIT`.

    Args:
        tokens: the initial size.
        longest_turn: the most tokens of a job's turn while others wait; None for a whole batch.

    Attributes:
        tokens: the current size.

    """

    def __init__(self, tokens: int, longest_turn: int | None = None) -> None:
        self.tokens = self._initial = tokens
        self._longest_turn = tokens if longest_turn is None else longest_turn
        self._wait = FIRST_WAIT
        self._successes = 0
        self._has_grown = False

    @property
    def turn(self) -> int:
        """The most tokens of a job's turn while others wait."""
        return min(self.tokens, self._longest_turn)

    def out_of_memory(self, tokens: int) -> None:
        """Reduce the size to `tokens` after a larger batch did not fit."""
        self.tokens = max(1, min(self.tokens, tokens))
        self._successes = 0
        if self._has_grown:
            self._wait = min(2 * self._wait, LONGEST_WAIT)
        self._has_grown = False

    def succeeded(self) -> None:
        """Count a batch that fitted."""
        if self.tokens == self._initial and not self._has_grown:
            return
        self._successes += 1
        if self._successes < self._wait:
            return
        self._successes = 0
        self._has_grown = self.tokens < self._initial
        if self._has_grown:
            self.tokens = min(2 * self.tokens, self._initial)
        else:
            self._wait = FIRST_WAIT
