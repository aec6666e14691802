"""Passages and pairs in files: what the command line reads and writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TextIO

from mistral_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from mistral_rerank.reranker import Reranker

BLOCK = 256
"""Pairs that `score_file` reads, scores and writes at a time."""

Record = dict[str, object]


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage and the JSON object it came in, which is empty for plain text."""

    text: str
    record: Record


def read_passages(lines: Iterable[str], name: str, *, json_lines: bool | None = None) -> list[Passage]:
    """Read one passage a line, plain or as JSON objects with "text"; blank lines are left out.

    Args:
        lines: an open file.
        name: what to call it in errors; a name that ends in .jsonl means JSON lines.
        json_lines: True or False to say which; None goes by the name, or else by the first line's "{".

    Raises:
        InvalidInputError: a line is no JSON object with a string "text"; it names the line.

    """
    kept = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if json_lines is None:
        json_lines = name.endswith((".jsonl", ".ndjson")) or (bool(kept) and _is_object(kept[0][1]))
    if not json_lines:
        return [Passage(line, {}) for _, line in kept]
    records = [_parse(line, f"{name}:{number}", ("text",)) for number, line in kept]
    return [Passage(f"{record.get('title') or ''} {record['text']}".strip(), record) for record in records]


def score_file(reranker: Reranker, pairs: TextIO, name: str, out: Path, *, progress: Callable[[int], None]) -> int:
    """Score JSON lines of {"query", "passage"} into the same lines with "logit" and "probability".

    Lines are written block by block to `<out>.partial`, which becomes `out` when it is complete. A run that
    was stopped goes on from what that file holds.

    Args:
        reranker: what scores.
        pairs: the open input.
        name: what to call it in errors.
        out: the file to write; it must not exist yet.
        progress: called with the number of pairs done after each block.

    Returns:
        How many pairs `out` holds.

    Raises:
        InvalidInputError: a line is not of the format, `out` exists, or the partial file is of other pairs.

    """
    if out.exists():
        raise InvalidInputError(f"{out} exists; give another --out, or remove it")
    partial = out.with_name(out.name + ".partial")
    records = _pair_records(pairs, name)
    done = _skip_done(partial, records)
    progress(done)
    with partial.open("a", encoding="utf-8") as sink:
        for scored in score_records(reranker, records):
            sink.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in scored))
            sink.flush()
            done += len(scored)
            progress(len(scored))
    partial.replace(out)
    return done


def score_lines(reranker: Reranker, pairs: TextIO, name: str) -> Iterator[Record]:
    """Score JSON lines of {"query", "passage"} one block after the other, as they are read."""
    for scored in score_records(reranker, _pair_records(pairs, name)):
        yield from scored


def score_records(reranker: Reranker, records: Iterator[Record]) -> Iterator[list[Record]]:
    """Add "logit" and "probability" to records, a block at a time."""
    while block := list(islice(records, BLOCK)):
        scores = reranker.score_pairs([(str(record["query"]), str(record["passage"])) for record in block])
        yield [
            record | {"logit": score.logit, "probability": score.probability}
            for record, score in zip(block, scores, strict=True)
        ]


def _pair_records(lines: Iterable[str], name: str) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            record = _parse(line, f"{name}:{number}", ("query", "passage"))
            if not str(record["query"]).strip():
                raise InvalidInputError(f'{name}:{number}: "query" is empty')
            yield record


def _skip_done(partial: Path, records: Iterator[Record]) -> int:
    """Drop a half-written last line, and move `records` past what is done."""
    if not partial.exists():
        return 0
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) != len(content):
        with partial.open("r+b") as file:
            file.truncate(len(whole))
    lines = whole.splitlines()
    for line in lines:
        record, old = next(records, None), json.loads(line)
        if record is None or any(record[key] != old.get(key) for key in ("query", "passage")):
            raise InvalidInputError(f"{partial} holds scores of other pairs; remove it, or give another --out")
    return len(lines)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _parse(line: str, place: str, strings: tuple[str, ...]) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidInputError(f"{place}: not JSON ({error})") from error
    wrong = [key for key in strings if not isinstance(record, dict) or not isinstance(record.get(key), str)]
    if wrong:
        raise InvalidInputError(f"{place}: expected a JSON object with the string {wrong[0]!r}")
    parsed: Record = record
    return parsed
