"""When to send: waits between attempts, and a limit of requests a minute."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

from mistral_rerank._forks import after_fork


@dataclass(frozen=True, slots=True)
class Retries:
    """How often, and after which wait, a failed request is sent again.

    Attributes:
        most: attempts after the first.
        first_wait: seconds before the second attempt; doubled for each further one.
        longest_wait: of our own choosing.
        longest_retry_after: that an endpoint may ask for; beyond it the call fails at once.

    """

    most: int = 2
    first_wait: float = 0.5
    longest_wait: float = 8.0
    longest_retry_after: float = 60.0

    def wait(self, attempt: int, retry_after: float | None) -> float | None:
        """Give the seconds to wait after attempt 0, 1, ...; None to give up."""
        if attempt >= self.most:
            return None
        if retry_after is not None:
            return retry_after if retry_after <= self.longest_retry_after else None
        wait = min(self.first_wait * 2.0**attempt, self.longest_wait)
        return wait * random.uniform(0.75, 1.0)  # noqa: S311 - spreads clients, guards nothing


class RateLimit:
    """Spreads requests so that a minute holds no more than so many; for threads and tasks alike."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._make_lock()
        after_fork(self._make_lock)

    def _make_lock(self) -> None:
        self._lock = threading.Lock()

    def reserve(self, now: float, *, before: float) -> float | None:
        """Take the next free moment; give the seconds until then. None if that is too late, and nothing is taken."""
        with self._lock:
            moment = max(now, self._next)
            if moment > now and moment >= before:
                return None
            self._next = moment + self._gap
        return moment - now
