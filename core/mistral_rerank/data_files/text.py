"""Users' text files: UTF-8 with or without a byte order mark, plain or `.gz`, and the fields of their records."""

from __future__ import annotations

import gzip
import io
import json
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import RawIOBase

STDIN = Path("-")
TEXT_FIELDS = ("text", "contents", "page_content")
"""Fields that hold a passage, as BEIR, Pyserini and LangChain name them; the first present field is used."""
ID_FIELDS = ("_id", "id")

Record = dict[str, object]

_SNIFFED = 4096
_UTF_16_OR_32 = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
_BINARY = {b"%PDF-": "a PDF", b"PAR1": "a Parquet file", b"PK\x03\x04": "a ZIP archive, such as .docx or .xlsx"}
_BINARY |= {b"\x1f\x8b": "a gzip archive", b"{\\rtf": "an RTF document"}


def text_lines(file: Path, *, newline: str | None = None) -> Iterator[str]:
    """Read a file, or `STDIN`, line by line, without its byte order mark; `newline` is that of `open`.

    Raises:
        InvalidInputError: it is not UTF-8 text, or is a damaged .gz.
        OSError: it cannot be read.

    """
    stdin = file == STDIN
    with open(sys.stdin.fileno() if stdin else file, "rb", buffering=0, closefd=not stdin) as raw:
        yield from lines_of(raw, shown_name(file), newline=newline)


def lines_of(raw: RawIOBase, name: str, *, newline: str | None = None) -> Iterator[str]:
    """Read an open file as `text_lines` does; `name` says whether it is a .gz."""
    try:
        with (
            gzip.open(raw) if name.endswith(".gz") else io.BufferedReader(raw) as content,
            io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline) as lines,
        ):
            _refuse_binary(content.peek(_SNIFFED), name)
            yield from lines
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{name} is not UTF-8 text ({error.reason}); convert it first") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidInputError(f"{name} is damaged or cut off ({error}); fetch it again") from error


def shown_name(file: Path) -> str:
    """Give the name of a file for errors."""
    return "stdin" if file == STDIN else str(file)


def json_record(line: str, location: str) -> Record:
    """Read a JSON object; an `InvalidInputError` names the location."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep, or a number too long"
        raise InvalidInputError(f"{location}: not JSON ({reason}); expected one JSON object a line") from error
    if not isinstance(record, dict):
        raise InvalidInputError(f"{location}: expected a JSON object, found {_kind(record)}")
    return record


def text_of(record: Record, location: str, field: str | None = None) -> str:
    """Give the text of a passage: the field, or else its title, if any, and the first of `TEXT_FIELDS`.

    Raises:
        InvalidInputError: there is no such field, or its value is no string; it names the location.

    """
    if field is not None:
        return string_of(record, location, (field,)).strip()
    text = string_of(record, location, TEXT_FIELDS)
    title = record.get("title")
    if title is not None and not isinstance(title, str):
        raise InvalidInputError(f'{location}: "title" is {_kind(title)}; expected a string')
    return f"{title or ''} {text}".strip()


def id_of(record: Record, location: str) -> str:
    """Give the id of a record, a string or a whole number, as a string; `InvalidInputError` if there is none."""
    name, value = _first(record, location, ID_FIELDS)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InvalidInputError(f'{location}: "{name}" is {_kind(value)}; expected a string')
    return str(value)


def string_of(record: Record, location: str, fields: tuple[str, ...]) -> str:
    """Give the first present field; `InvalidInputError` if there is none, or its value is no string."""
    name, value = _first(record, location, fields)
    if not isinstance(value, str):
        raise InvalidInputError(f'{location}: "{name}" is {_kind(value)}; expected a string')
    return value


def _first(record: Record, location: str, fields: tuple[str, ...]) -> tuple[str, object]:
    present = [(name, record[name]) for name in fields if name in record]
    if not present:
        known = ", ".join(list(map(repr, record))[:10]) or "no fields"
        raise InvalidInputError(f"{location}: lacks {' or '.join(map(repr, fields))}; it has {known}")
    return next((pair for pair in present if pair[1] is not None), present[0])


def _kind(value: object) -> str:
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "an object")


def _refuse_binary(start: bytes, name: str) -> None:
    if start.startswith(_UTF_16_OR_32):
        raise InvalidInputError(f"{name} is UTF-16 or UTF-32, not UTF-8 text; save it as UTF-8")
    kind = next((kind for magic, kind in _BINARY.items() if start.startswith(magic)), None)
    if kind is None and b"\0" in start:
        kind = "binary, or text in UTF-16"
    if kind is not None:
        raise InvalidInputError(f"{name} is {kind}, not UTF-8 text; give its text instead")
