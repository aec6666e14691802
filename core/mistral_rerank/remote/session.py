"""Sessions: the requests of one task as a generator without I/O, and how a thread or an event loop runs it.

A session yields a `Request` to be sent or a `Sleep`. It is sent the `Response`, or the error of the transport is thrown
into it. Threads and event loops therefore share retries, polling and the detection of the protocol.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mistral_rerank.errors import RemoteError
from mistral_rerank.remote.transport import Request, Response

if TYPE_CHECKING:
    from collections.abc import Callable

    from mistral_rerank.remote.transport import Transport

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sleep:
    """A pause before the next request."""

    seconds: float


Session = Generator[Request | Sleep, Response | None, T]


def send(request: Request) -> Session[Response]:
    """Yield one request, and give its response."""
    response = yield request
    assert response is not None  # noqa: S101 - a Request is answered by a Response
    return response


def run(
    session: Session[T],
    transport: Transport,
    *,
    sleep: Callable[[float], object] = time.sleep,
    check: Callable[[], None] = lambda: None,
) -> T:
    """Run a session in this thread.

    Args:
        session: the requests.
        transport: sends them.
        sleep: waits for so many seconds.
        check: is called before each step, and raises to end the session.

    """
    try:
        step = next(session)
        while True:
            check()
            if isinstance(step, Sleep):
                sleep(step.seconds)
                step = session.send(None)
                continue
            try:
                response = transport.send(step)
            except RemoteError as error:
                step = session.throw(error)
            else:
                step = session.send(response)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        session.close()


async def arun(session: Session[T], transport: Transport, *, check: Callable[[], None]) -> T:
    """Run a session on the running event loop; see `run`."""
    try:
        step = next(session)
        while True:
            check()
            if isinstance(step, Sleep):
                await asyncio.sleep(step.seconds)
                step = session.send(None)
                continue
            try:
                response = await transport.asend(step)
            except RemoteError as error:
                step = session.throw(error)
            else:
                step = session.send(response)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        session.close()
