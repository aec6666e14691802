"""When a request may be sent: retries with exponential backoff, jitter and `Retry-After`, and a rate limit."""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mistral_rerank._forks import after_fork
from mistral_rerank.errors import RemoteDeadlineExceededError, RemoteError
from mistral_rerank.remote.error_mapping import is_retryable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

CLOCK_SLACK = 0.005
"""A timeout that ends this many seconds before the deadline is attributed to the deadline."""


@dataclass(frozen=True, slots=True)
class Retries:
    """Number of retries, and the waits before them.

    Attributes:
        most: attempts after the first.
        first_wait: seconds before the second attempt; doubled for each further one.
        longest_wait: most seconds of a wait without `Retry-After`.
        longest_retry_after: most seconds of an endpoint's `Retry-After`; a longer one fails the call at once.

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
        return wait * random.uniform(0.75, 1.0)  # noqa: S311 - jitter


async def with_retries(attempt: Callable[[], Awaitable[T]], retries: Retries, *, deadline: float = math.inf) -> T:
    """Repeat an attempt whose error may be temporary, until `deadline` on `time.monotonic`'s clock.

    Raises:
        RemoteDeadlineExceededError: the deadline has passed.
        RemoteError: of the last attempt.

    """
    attempts = 0
    while True:
        try:
            return await attempt()
        except RemoteDeadlineExceededError:
            raise
        except RemoteError as error:
            if time.monotonic() >= deadline - CLOCK_SLACK:
                raise RemoteDeadlineExceededError(
                    f"the time of the call is over, raise timeout or deadline; last: {error}",
                    status=error.status,
                    request_id=error.request_id,
                ) from error
            wait = retries.wait(attempts, error.retry_after) if is_retryable(error) else None
            if wait is None or time.monotonic() + wait >= deadline:
                raise
        await asyncio.sleep(wait)
        attempts += 1


class RateLimit:
    """Spaces requests evenly over each minute, for all threads and event loops together."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._make_lock()
        after_fork(self._make_lock)

    def _make_lock(self) -> None:
        self._lock = threading.Lock()

    def reserve(self, now: float, *, before: float) -> float | None:
        """Reserve the next free time slot; `now` and the deadline `before` are times of one clock.

        Returns:
            Seconds until the slot; None if it is after the deadline, and then nothing is reserved.

        """
        with self._lock:
            slot = max(now, self._next)
            if slot > now and slot >= before:
                return None
            self._next = slot + self._gap
        return slot - now
