"""Locks, threads and sockets across `os.fork`.

A forked child has a copy of the parent's memory and none of its threads. A lock that another thread held stays locked
forever in the child, and imports and native libraries (OpenMP, oneDNN, tokenizers) have locks too. So a fork waits
until every `ForkLock` is free, and in the child all are free. Objects with threads, sockets or other locks register a
method with `after_fork` that replaces them in the child.

On platforms without fork this module does nothing.
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
"""The most seconds that a fork waits for all locks: longer than a batch takes, not always longer than a load."""

_TOKENIZERS_VARIABLE = "TOKENIZERS_PARALLELISM"

_locks: dict[int, weakref.ref[ForkLock]] = {}
_methods: list[weakref.WeakMethod[Callable[[], None]]] = []
_forking = threading.Lock()
_held: list[ForkLock] = []
_variable_was_unset = False


class ForkLock:
    """A lock that a fork in another thread waits for. Hold it around native code and imports; never hold two.

    A second lock, the gate, is taken before the first. A waiting fork holds the gate, so a thread that takes the lock
    in a loop cannot starve the fork.
    """

    def __init__(self) -> None:
        self._reset()
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

    def _acquire_until(self, deadline: float) -> bool:
        if not self._gate.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return False
        try:
            return self._lock.acquire(timeout=max(0.0, deadline - time.monotonic()))
        finally:
            self._gate.release()

    def _reset(self) -> None:
        self._gate, self._lock = threading.Lock(), threading.Lock()


def after_fork(method: Callable[[], None]) -> None:
    """Register a bound method to run in forked children, as long as its object lives."""
    _methods[:] = [reference for reference in _methods if reference() is not None]
    _methods.append(weakref.WeakMethod(method))


def _before() -> None:
    global _variable_was_unset
    _forking.acquire()
    deadline = time.monotonic() + LONGEST_WAIT
    for reference in list(_locks.values()):
        lock = reference()
        if lock is not None and lock._acquire_until(deadline):
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
        os.environ[_TOKENIZERS_VARIABLE] = "false"  # its thread pool is the parent's; a batch would wait for it forever
    _held.clear()
    for reference in list(_locks.values()):
        if (lock := reference()) is not None:
            lock._reset()
    for method_reference in _methods:
        if (method := method_reference()) is not None:
            method()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
