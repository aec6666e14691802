"""A client-side limit of requests per minute."""

from __future__ import annotations

import threading

from mistral_rerank._forks import after_fork


class RateLimit:
    """Spaces requests evenly over each minute, for threads and event loops together."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._make_lock()
        after_fork(self._make_lock)

    def _make_lock(self) -> None:
        self._lock = threading.Lock()

    def reserve(self, now: float, *, before: float) -> float | None:
        """Reserve the next free time slot.

        Args:
            now: the time, on the clock of `before`.
            before: the deadline.

        Returns:
            Seconds until the slot; None if it is after the deadline, and then nothing is reserved.

        """
        with self._lock:
            slot = max(now, self._next)
            if slot > now and slot >= before:
                return None
            self._next = slot + self._gap
        return slot - now
