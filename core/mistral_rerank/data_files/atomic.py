"""Files that appear whole or not at all, and work that goes on after a stop.

Half a surrogate pair, which JSON can hold and UTF-8 cannot, is written as JSON's escape for it.
"""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO
from uuid import uuid4

from mistral_rerank.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Give a new path beside `path`: the file or folder made there takes its place at the end.

    The name is of this call alone, so threads and processes that write one file do not meet. After an error nothing
    is left of it.
    """
    beside = path.with_name(f".{uuid4().hex}.partial")
    try:
        yield beside
        beside.replace(path)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


@contextmanager
def atomic_write(file: Path) -> Iterator[TextIO]:
    """Open a text file that takes the place of `file` at the end; see `replacement`."""
    with (
        replacement(file) as beside,
        beside.open("x", encoding="utf-8", errors="backslashreplace", newline="\n") as lines,
    ):
        yield lines


def write_json(file: Path, content: object) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_write(file) as out:
        out.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def open_append(file: Path) -> TextIO:
    """Open a text file to go on at its end."""
    return file.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")


def read_complete_lines(file: Path) -> list[bytes]:
    """Read the lines of a file that was appended to, none if it is not there, and cut off a half-written last one."""
    content = file.read_bytes() if file.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) != len(content):
        with file.open("r+b") as rest:
            rest.truncate(len(whole))
    return whole.splitlines()


def check_resume_settings(file: Path, asked: Mapping[str, object], *, holder: Path) -> None:
    """Write down what work that may be stopped is asked for, or see that it is the same as when it was stopped.

    Args:
        file: holds it, as JSON; its folder is made.
        asked: names and values that JSON gives back unchanged.
        holder: what keeps the work that is done, for the error.

    Raises:
        SettingsError: it is not the same.

    """
    old = json.loads(file.read_text("utf-8")) if file.is_file() else asked
    if differs := sorted(key for key in {*old, *asked} if old.get(key) != asked.get(key)):
        raise SettingsError(f"{holder} holds work with another {', '.join(differs)}; remove it, or give another --out")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asked)
