"""BEIR folders: `corpus.jsonl`, `queries.jsonl` and `qrels/<split>.tsv`, each plain or `.gz`.

Ids may be called `_id` or `id`, texts `text`, `contents` or `page_content`.

Source of the format: https://github.com/beir-cellar/beir/wiki/Load-your-custom-dataset
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistral_rerank.data_files.text import TEXT_FIELDS, Record, id_of, json_record, string_of, text_lines, text_of
from mistral_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
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
    """Read a BEIR folder; without a split, its only one.

    Raises:
        InvalidInputError: a file is missing or empty, or a line is not of the format; it names the file and line.

    """
    splits = qrels_files(folder)
    chosen = [file for name, file in splits.items() if split in (None, name)]
    if len(chosen) != 1:
        names = ", ".join(sorted(splits)) or "none"
        raise InvalidInputError(
            f"{folder} is not a BEIR folder with one qrels/{split or '<split>'}.tsv (found: {names})"
        )
    qrels = _read_qrels(chosen[0])
    corpus = _texts(folder, "corpus", text_of)
    queries = {query: text for query, text in _texts(folder, "queries", _question).items() if query in qrels}
    if lost := sorted(qrels.keys() - queries.keys()):
        raise InvalidInputError(f"{folder}: {len(lost)} judged queries have no text, such as {lost[0]!r}")
    if not queries or not corpus:
        raise InvalidInputError(f"{folder} has {len(queries)} judged queries and {len(corpus)} passages; it needs both")
    return BeirDataset(folder.name, corpus, queries, qrels)


def qrels_files(folder: Path) -> dict[str, Path]:
    """Give the files of judgements by the names of their splits; a plain file comes before a packed one."""
    files = [file for suffix in (".tsv.gz", ".tsv") for file in sorted((folder / "qrels").glob(f"*{suffix}"))]
    return {file.name.removesuffix(".gz").removesuffix(".tsv"): file for file in files}


def _read_qrels(file: Path) -> dict[str, dict[str, int]]:
    """Read judgements, under a header or without one."""
    qrels: dict[str, dict[str, int]] = {}
    rows = csv.reader(text_lines(file, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    for number, row in enumerate(rows, start=1):
        if not any(row) or (number == 1 and len(row) == 3 and not _is_number(row[2])):
            continue
        try:
            query, passage, grade = row
            value = float(grade)
            if not value.is_integer():
                raise ValueError(grade)
        except ValueError as error:
            raise InvalidInputError(
                f"{file}:{number}: expected query-id, corpus-id, score (a whole number), separated by tabs"
            ) from error
        if qrels.setdefault(query, {}).setdefault(passage, int(value)) != value:
            raise InvalidInputError(f"{file}:{number}: another score for the pair of an earlier line")
    return qrels


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _texts(folder: Path, stem: str, text_in: Callable[[Record, str], str]) -> dict[str, str]:
    """Read id and text of each line of `<stem>.jsonl`."""
    files = [folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise InvalidInputError(f"{folder} has no {stem}.jsonl or {stem}.jsonl.gz; it is not a BEIR folder")
    texts: dict[str, str] = {}
    for number, line in enumerate(text_lines(file), start=1):
        if not line.strip():
            continue
        location = f"{file}:{number}"
        record = json_record(line, location)
        name, text = id_of(record, location), text_in(record, location)
        if texts.setdefault(name, text) != text:
            raise InvalidInputError(f"{location}: the id {name!r} of an earlier line, with another text")
    return texts


def _question(record: Record, location: str) -> str:
    return string_of(record, location, TEXT_FIELDS)
