"""Deadlines: how long a thread or a task waits for the result of a call."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING, TypeVar

from mistral_rerank.errors import DeadlineExceededError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

T = TypeVar("T")


def result_within(seconds: float | None, future: Future[T]) -> T:
    """Wait for a future, and cancel it after `seconds`; None to wait for ever.

    Raises:
        DeadlineExceededError: there was no result in time.

    """
    try:
        return future.result(seconds)
    except TimeoutError:
        if not future.cancel():  # it has ended, with this error or since
            return future.result()
        raise _late(seconds) from None


def in_thread(call: Callable[[], T]) -> Future[T]:
    """Run a call in a daemon thread of its own; cancelling the future drops the result, and the call runs on."""
    future: Future[T] = Future()
    context = copy_context()

    def run() -> None:
        try:
            result = context.run(call)
        except BaseException as error:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        else:
            if future.set_running_or_notify_cancel():
                future.set_result(result)

    threading.Thread(target=run, name="mistral-rerank-call", daemon=True).start()
    return future


@asynccontextmanager
async def within(seconds: float | None) -> AsyncIterator[None]:
    """Cancel the body after `seconds`; None for no limit.

    Raises:
        DeadlineExceededError: the body was cancelled.

    """
    timeout = asyncio.timeout(seconds)
    try:
        async with timeout:
            yield
    except TimeoutError:
        if timeout.expired():
            raise _late(seconds) from None
        raise


def _late(seconds: float | None) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"no result within {seconds:.3g} s; give a longer deadline, or fewer or shorter passages"
    )
