"""How large a batch may be: smaller after memory ran short, and larger again when that has passed."""

FIRST_WAIT = 8
LONGEST_WAIT = 1024


class BatchSize:
    """The tokens that a batch may compute.

    After `FIRST_WAIT` batches without trouble it doubles, up to where it began. Each time that this was too early the
    next wait is twice as long.

    Attributes:
        tokens: the size now.

    """

    def __init__(self, tokens: int) -> None:
        self.tokens = self._most = tokens
        self._wait = FIRST_WAIT
        self._successes = 0
        self._has_grown = False

    def ran_short(self, tokens: int) -> None:
        """Go down to `tokens`, because a larger batch did not fit."""
        self.tokens = max(1, min(self.tokens, tokens))
        self._successes = 0
        if self._has_grown:
            self._wait = min(2 * self._wait, LONGEST_WAIT)
        self._has_grown = False

    def ran_well(self) -> None:
        """Count a batch that fitted."""
        if self.tokens == self._most and not self._has_grown:
            return
        self._successes += 1
        if self._successes < self._wait:
            return
        self._successes = 0
        self._has_grown = self.tokens < self._most
        if self._has_grown:
            self.tokens = min(2 * self.tokens, self._most)
        else:
            self._wait = FIRST_WAIT
