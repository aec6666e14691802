"""Files of passages for the command line: lines of text, JSON lines, JSON, CSV and TSV."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from mistral_rerank.data_files.text import TEXT_FIELDS, Record, json_record, shown_name, text_lines, text_of
from mistral_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

JSON_LINES = (".jsonl", ".ndjson")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
REFUSED = frozenset(
    {
        *(".7z", ".arrow", ".avro", ".bz2", ".db", ".doc", ".docx", ".eml", ".epub", ".feather", ".htm", ".html"),
        *(".odt", ".orc", ".parquet", ".pdf", ".pickle", ".pkl", ".ppt", ".pptx", ".rtf", ".sqlite", ".tar", ".toml"),
        *(".xls", ".xlsx", ".xml", ".xz", ".yaml", ".yml", ".zip", ".zst"),
    }
)
"""Formats that are not text files of passages."""
FORMATS = "lines of text, JSON lines (.jsonl), JSON (.json), .csv and .tsv, plain or .gz"


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage and its JSON object or row, which is empty for plain text."""

    text: str
    record: Record


def read_passages(file: Path, *, text_field: str | None = None) -> list[Passage]:
    """Read the passages of a file; `text_field` is that of `text_of`.

    The suffix decides: .jsonl and .ndjson are JSON lines, .json is an array or JSON lines, .csv and .tsv are rows under
    a header. Other files, and standard input, are JSON if their first character starts JSON, else one passage per
    line. Blank lines are skipped.

    Raises:
        InvalidInputError: unsupported format, or a record without the field; the error names the location.
        OSError: it cannot be read.

    """
    name, suffix = shown_name(file), _suffix(file)
    if suffix in REFUSED:
        raise InvalidInputError(f"{name}: {suffix} files are not read; give {FORMATS}")
    if suffix in DELIMITERS:
        records: Iterable[tuple[str, Record | str]] = _rows(file, name, DELIMITERS[suffix])
    else:
        lines = [(f"{name}:{number}", line) for number, line in enumerate(text_lines(file), start=1)]
        values = _json_records(lines, name, suffix)
        if values is None:
            texts = [line.strip() for _, line in lines if line.strip()]
            if text_field is not None and texts:
                raise InvalidInputError(f"{name} holds lines of text, which have no field {text_field!r}")
            return [Passage(text, {}) for text in texts]
        records = values
    return [
        Passage(record, {}) if isinstance(record, str) else Passage(text_of(record, location, text_field), record)
        for location, record in records
    ]


def _suffix(file: Path) -> str:
    name = PurePath(file.name.lower())
    return PurePath(name.stem).suffix if name.suffix == ".gz" else name.suffix


def _json_records(lines: list[tuple[str, str]], name: str, suffix: str) -> Iterable[tuple[str, Record | str]] | None:
    """Give the values of JSON with their locations; None if it is plain text."""
    filled = [(location, line.strip()) for location, line in lines if line.strip()]
    if suffix not in JSON_LINES:
        if suffix != ".json" and not (filled and filled[0][1][0] in "[{"):
            return None
        whole = _parsed("".join(line for _, line in lines))
        if isinstance(whole, list) and (suffix == ".json" or any(isinstance(item, dict | str) for item in whole)):
            return _items(whole, name)
        if isinstance(whole, dict):
            return [(f"{name}:1", whole)]
        if suffix != ".json" and not isinstance(_parsed(filled[0][1]), dict):
            return None
    return ((location, json_record(line, location)) for location, line in filled)


def _parsed(text: str) -> object:
    """Parse JSON; None for other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _items(items: list[object], name: str) -> Iterator[tuple[str, Record | str]]:
    for number, item in enumerate(items, start=1):
        location = f"{name}, item {number}"
        if not isinstance(item, dict | str):
            raise InvalidInputError(f"{location}: expected a string, or an object with {TEXT_FIELDS[0]!r}")
        yield location, item


def _rows(file: Path, name: str, delimiter: str) -> Iterator[tuple[str, Record | str]]:
    rows = csv.reader(text_lines(file, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        for row in rows:
            if not row:
                continue
            location = f"{name}:{rows.line_num}"
            if len(row) != len(header):
                raise InvalidInputError(f"{location}: {len(row)} columns under a header of {len(header)}")
            yield location, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise InvalidInputError(f"{name}:{rows.line_num}: {error}") from error
