"""Files that are whole or not there, work that is taken up again, and the passages and pairs of the command line.

Half a surrogate pair, which JSON can hold and UTF-8 cannot, is written as JSON's escape for it.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TextIO

from mistral_rerank.errors import InvalidInputError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from mistral_rerank.reranker import Reranker

BLOCK = 256
"""Pairs that `score_file` reads, scores and writes at a time."""

Record = dict[str, object]


@contextmanager
def replacing(file: Path) -> Iterator[TextIO]:
    """Open a text file beside `file` that takes its place at the end; after an error nothing is left of it."""
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as lines:
            yield lines
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def write_json(file: Path, content: object) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(file) as out:
        out.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def appending(file: Path) -> TextIO:
    """Open a text file to go on at its end."""
    return file.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")


def whole_lines(file: Path) -> list[bytes]:
    """Read the lines of a file that was appended to, none if it is not there, and cut off a half-written last one."""
    content = file.read_bytes() if file.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) != len(content):
        with file.open("r+b") as rest:
            rest.truncate(len(whole))
    return whole.splitlines()


def claim(file: Path, asked: Mapping[str, object], *, holder: Path) -> None:
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
        raise SettingsError(
            f"{holder} holds work with another {', '.join(differs)}; remove it, or give another --out"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asked)


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


def score_file(
    reranker: Reranker,
    pairs: TextIO,
    name: str,
    out: Path,
    *,
    settings: Mapping[str, object],
    progress: Callable[[int], None],
) -> int:
    """Score JSON lines of {"query", "passage"} into the same lines with "logit" and "probability".

    Lines are written block by block to `<out>.partial`, which becomes `out` when it is complete. A run that
    was stopped goes on from what that file holds.

    Args:
        reranker: what scores.
        pairs: the open input.
        name: what to call it in errors.
        out: the file to write; it must not exist yet.
        settings: of the reranker, as the user gave them; a run only goes on from one with the same.
        progress: called with the number of pairs done after each block.

    Returns:
        How many pairs `out` holds.

    Raises:
        InvalidInputError: a line is not of the format, `out` exists, or the partial file is of other pairs.
        SettingsError: the partial file is of another model, or other settings.

    """
    if out.exists():
        raise InvalidInputError(f"{out} exists; give another --out, or remove it")
    partial, kept = (out.with_name(out.name + end) for end in (".partial", ".settings"))
    if not partial.exists():
        kept.unlink(missing_ok=True)  # of work that was thrown away
    claim(kept, {"model": reranker.model_name, **settings}, holder=partial)
    records = _pair_records(pairs, name)
    done = _skip_done(partial, records)
    progress(done)
    with appending(partial) as sink:
        for scored in score_records(reranker, records):
            sink.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in scored))
            sink.flush()
            done += len(scored)
            progress(len(scored))
    partial.replace(out)
    kept.unlink()
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
    """Move `records` past what is done."""
    lines = whole_lines(partial)
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
