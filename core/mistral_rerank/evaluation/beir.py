"""BEIR folders: `corpus.jsonl`, `queries.jsonl` (or `.gz`) and `qrels/<split>.tsv`.

Source of the format: https://github.com/beir-cellar/beir/wiki/Load-your-custom-dataset
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistral_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class BeirDataset:
    """One data set in memory.

    Attributes:
        name: the folder's name.
        corpus: passage id -> the text that a model reads, title and text joined.
        queries: query id -> question, only those that are judged.
        qrels: query id -> passage id -> grade; a grade above 0 is relevant.

    """

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]

    def positives(self, query_id: str) -> list[str]:
        """Ids of the relevant passages, in the order of the file."""
        return [passage for passage, grade in self.qrels[query_id].items() if grade > 0]

    def labels(self, query_id: str, passages: Sequence[str]) -> list[int]:
        """Give 1 for each passage id that is judged relevant, else 0."""
        return [int(self.qrels[query_id].get(passage, 0) > 0) for passage in passages]


def load_beir(folder: Path, *, split: str | None = None) -> BeirDataset:
    """Read a BEIR folder.

    Args:
        folder: holds the three files.
        split: which `qrels/<split>.tsv`; None takes the only one there is.

    Raises:
        InvalidInputError: a file is missing or empty, or a line is not of the format; it names the file and line.

    """
    qrels = _read_qrels(_qrels_file(folder, split))
    corpus = {
        str(record["_id"]): f"{record.get('title') or ''} {record['text']}".strip()
        for record in _read_jsonl(folder, "corpus", ("_id", "text"))
    }
    queries = {
        str(record["_id"]): str(record["text"])
        for record in _read_jsonl(folder, "queries", ("_id", "text"))
        if str(record["_id"]) in qrels
    }
    if lost := sorted(qrels.keys() - queries.keys()):
        raise InvalidInputError(f"{folder}: {len(lost)} judged queries have no text, such as {lost[0]!r}")
    if not queries or not corpus:
        raise InvalidInputError(
            f"{folder} has {len(queries)} judged queries and {len(corpus)} passages; it needs both"
        )
    return BeirDataset(folder.name, corpus, queries, qrels)


def _qrels_file(folder: Path, split: str | None) -> Path:
    found = sorted((folder / "qrels").glob("*.tsv"))
    if split is not None:
        found = [file for file in found if file.stem == split]
    if len(found) != 1:
        names = ", ".join(file.stem for file in found) or "none"
        raise InvalidInputError(
            f"{folder} is not a BEIR folder with one qrels/{split or '<split>'}.tsv (found: {names})"
        )
    return found[0]


def _read_qrels(file: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    with file.open(encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        next(rows, None)
        for number, row in enumerate(rows, start=2):
            try:
                query, passage, grade = row
                qrels.setdefault(query, {})[passage] = int(float(grade))
            except ValueError as error:
                raise InvalidInputError(f"{file}:{number}: expected query-id, corpus-id, score") from error
    return qrels


def _read_jsonl(folder: Path, stem: str, needed: tuple[str, ...]) -> Iterator[dict[str, object]]:
    plain, packed = folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz"
    if not plain.is_file() and not packed.is_file():
        raise InvalidInputError(f"{folder} has no {stem}.jsonl or {stem}.jsonl.gz; it is not a BEIR folder")
    file = plain if plain.is_file() else packed
    with gzip.open(file) if file is packed else file.open("rb") as lines:
        for number, line in enumerate(_unpacked(lines, file), start=1):
            try:
                record = json.loads(line)
                missing = [key for key in needed if key not in record]
            except (ValueError, TypeError) as error:
                raise InvalidInputError(f"{file}:{number}: not a JSON object") from error
            if missing:
                raise InvalidInputError(f"{file}:{number}: lacks {', '.join(missing)}")
            yield record


def _unpacked(lines: Iterable[bytes], file: Path) -> Iterator[bytes]:
    try:
        yield from lines
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidInputError(f"{file} is damaged or cut off ({error}); fetch it again") from error
