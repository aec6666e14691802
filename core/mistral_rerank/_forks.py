"""Locks, threads and sockets across `os.fork`.

A forked child has a copy of the parent's memory and none of its threads. A lock that another thread held stays locked
for ever, and imports and native libraries (OpenMP, oneDNN, tokenizers) hold locks of their own. So a fork waits until
every `ForkLock` is free, and the child starts with free ones. What holds threads, sockets or other locks registers a
method with `after_fork`, which replaces them in the child.

Where the platform cannot fork, nothing here does anything.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

LONGEST_WAIT = 60.0
"""Seconds that a fork waits in all: longer than a batch; a model that takes longer to load is loaded by the child."""

_TOKENIZERS_VARIABLE = "TOKENIZERS_PARALLELISM"

_locks: dict[int, weakref.ref[ForkLock]] = {}
_methods: list[weakref.WeakMethod[Callable[[], None]]] = []
_forking = threading.Lock()
_held: list[ForkLock] = []
_variable_was_unset = False


class ForkLock:
    """A lock that a fork in another thread waits for. Hold it around native code and imports; never hold two.

    A second lock is the gate to the first. A fork that waits holds the gate, so a thread that takes the lock again
    and again cannot starve it.
    """

    def __init__(self) -> None:
        self._make_free()
        key = id(self)
        _locks[key] = weakref.ref(self, lambda _: _locks.pop(key, None))

    def __enter__(self) -> Self:
        with self._gate:
            self._lock.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _acquire_until(self, moment: float) -> bool:
        if not self._gate.acquire(timeout=max(0.0, moment - time.monotonic())):
            return False
        try:
            return self._lock.acquire(timeout=max(0.0, moment - time.monotonic()))
        finally:
            self._gate.release()

    def _make_free(self) -> None:
        self._gate, self._lock = threading.Lock(), threading.Lock()


def after_fork(method: Callable[[], None]) -> None:
    """Run a bound method in every child that is forked from now on, as long as its object lives."""
    _methods[:] = [known for known in _methods if known() is not None]
    _methods.append(weakref.WeakMethod(method))


def _before() -> None:
    global _variable_was_unset
    _forking.acquire()
    moment = time.monotonic() + LONGEST_WAIT
    for reference in list(_locks.values()):
        lock = reference()
        if lock is not None and lock._acquire_until(moment):
            _held.append(lock)
    # tokenizers prints a warning in the child unless the variable is set before the fork
    _variable_was_unset = "tokenizers" in sys.modules and _TOKENIZERS_VARIABLE not in os.environ
    if _variable_was_unset:
        os.environ[_TOKENIZERS_VARIABLE] = "false"


def _in_parent() -> None:
    if _variable_was_unset:
        os.environ.pop(_TOKENIZERS_VARIABLE, None)
    while _held:
        _held.pop()._lock.release()
    _forking.release()


def _in_child() -> None:
    global _forking
    _forking = threading.Lock()
    if "tokenizers" in sys.modules:
        os.environ[_TOKENIZERS_VARIABLE] = "false"  # its threads are the parent's; on them a batch would wait for ever
    _held.clear()
    for reference in list(_locks.values()):
        if (lock := reference()) is not None:
            lock._make_free()
    for known in _methods:
        if (method := known()) is not None:
            method()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
