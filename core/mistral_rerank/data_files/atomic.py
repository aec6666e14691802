"""Atomic writes, and files for resumable work.

Half a surrogate pair, which JSON allows and UTF-8 does not, is written as its JSON escape.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO
from uuid import uuid4

from mistral_rerank.errors import SettingsError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; the file or folder made there replaces `path` if there is no error.

    The path is unique to the call, so threads and processes can write one file at once.
    """
    temporary = path.with_name(f".{uuid4().hex}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(file: Path) -> Iterator[TextIO]:
    """Open a text file that replaces `file` at the end; see `replacement`."""
    with (
        replacement(file) as temporary,
        temporary.open("x", encoding="utf-8", errors="backslashreplace", newline="\n") as lines,
    ):
        yield lines


def write_json(file: Path, content: object) -> None:
    """Write a JSON file atomically."""
    with atomic_write(file) as out:
        out.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def open_append(file: Path) -> TextIO:
    """Open a text file for appending."""
    return file.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")


def complete_lines(file: Path) -> Iterator[bytes]:
    """Read the lines of an appended file, none if it does not exist, and remove an incomplete last line from it."""
    if not file.exists():
        return
    with file.open("r+b") as lines:
        end = 0
        for line in lines:
            if line.endswith(b"\n"):
                end += len(line)
                yield line
            else:
                lines.truncate(end)


@contextmanager
def only_writer(file: Path) -> Iterator[None]:
    """Hold the lock `<file>.lock`, which ends with the process.

    Raises:
        SettingsError: another process holds it.

    """
    path = file.with_name(file.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as lock:
        if not (_lock(lock.fileno()) and path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno()))):
            raise SettingsError(f"another process writes {file}; wait for its end, or give another --out")
        try:
            yield
        finally:
            if sys.platform != "win32":  # which removes no open file
                path.unlink(missing_ok=True)


def _lock(descriptor: int) -> bool:
    """Lock an open file, if no other process has."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def check_resume_settings(file: Path, settings: Mapping[str, object], *, holder: Path) -> None:
    """Store the settings of resumable work, or check that they equal those of the stopped run.

    Args:
        file: of the stored settings, as JSON; its folder is created.
        settings: names and values that JSON preserves.
        holder: file or folder with the completed work, for the error.

    Raises:
        SettingsError: the settings differ.

    """
    if file.is_file():
        check_equal_settings(json.loads(file.read_text("utf-8")), settings, holder=holder)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def check_equal_settings(old: Mapping[str, object], settings: Mapping[str, object], *, holder: Path | str) -> None:
    """Check that the settings of a stopped run equal those of this one; see `check_resume_settings`."""
    if differs := sorted(key for key in {*old, *settings} if old.get(key) != settings.get(key)):
        raise SettingsError(f"{holder} holds work with another {', '.join(differs)}; remove it, or give another --out")
