"""Scores the pairs of a file; a stopped run resumes."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Self

from mistral_rerank.data_files.atomic import check_resume_settings, complete_lines, only_writer, open_append
from mistral_rerank.data_files.text import Record, json_record, string_of
from mistral_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import TextIO

    from mistral_rerank.reranker import Reranker
    from mistral_rerank.scores import Score

BLOCK = 256
"""Pairs of a block, which is read, scored and written together."""


def score_file(
    reranker: Reranker,
    pairs: Iterable[str],
    name: str,
    out: Path,
    *,
    settings: Mapping[str, object],
    progress: Callable[[int], None],
    rejects: Path | None = None,
) -> int:
    """Score JSON lines of {"query", "passage"} into the same lines with "logit" and "probability"; give their number.

    Blocks are appended to `<out>.partial`, which a stopped run resumes from. It becomes `out` when it is complete.
    A lock keeps other processes from the same `out`.

    Args:
        reranker: scores the pairs.
        pairs: the lines of the input.
        name: of the input, for errors.
        out: the file to write; it must not exist yet.
        settings: of the reranker; a run resumes only with the same settings.
        progress: called after each block with its number of pairs.
        rejects: a file for invalid lines, with their numbers and reasons; None to stop at the first one.

    Raises:
        InvalidInputError: a line is invalid, `out` exists, or the partial file has other pairs.
        SettingsError: the partial file is from another model, other weights or other settings, or another process
            writes it.

    """
    partial, settings_file = (out.with_name(out.name + end) for end in (".partial", ".settings"))
    with only_writer(out):
        if out.exists():
            raise InvalidInputError(f"{out} exists; give another --out, or remove it")
        if not partial.exists():
            settings_file.unlink(missing_ok=True)  # of a run whose partial file was removed
        weights = {"model": reranker.model_name, "weights": reranker.weights_checksum()}
        check_resume_settings(settings_file, {**weights, **settings}, holder=partial)
        with _Rejects(rejects) as rejected, open_append(partial) as sink:
            records = _pair_records(pairs, name, rejected)
            done = _skip_done(partial, records)
            progress(done)
            for scored in _score_records(reranker, records):
                sink.write("".join(map(record_line, scored)))
                sink.flush()
                done += len(scored)
                progress(len(scored))
        partial.replace(out)
        settings_file.unlink()
    return done


def score_lines(
    reranker: Reranker, pairs: Iterable[str], name: str, *, rejects: Path | None = None
) -> Iterator[Record]:
    """Score JSON lines of {"query", "passage"} block by block; `rejects` as in `score_file`."""
    with _Rejects(rejects) as rejected:
        for scored in _score_records(reranker, _pair_records(pairs, name, rejected)):
            yield from scored


def _score_records(reranker: Reranker, records: Iterator[Record]) -> Iterator[list[Record]]:
    while block := list(islice(records, BLOCK)):
        yield [record | columns_of(score) for record, score in scored_records(reranker, block)]


def scored_records(reranker: Reranker, records: Sequence[Record]) -> Iterator[tuple[Record, Score]]:
    """Score records in one call, and give each with its score."""
    scores = reranker.score_pairs([(str(record["query"]), str(record["passage"])) for record in records])
    return zip(records, scores, strict=True)


def columns_of(score: Score) -> Record:
    """Give what is added to a record."""
    return {"logit": score.logit, "probability": score.probability}


class _Rejects:
    """Writes invalid lines to a file, which is begun anew by each run, or raises their errors."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._sink: TextIO | None = None

    def __enter__(self) -> Self:
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._sink = open_append(self._file)
        return self

    def __exit__(self, *_: object) -> None:
        if self._sink is not None:
            self._sink.close()

    def add(self, number: int, line: str, error: InvalidInputError) -> None:
        if self._sink is None:
            raise error
        rejected: Record = {"line": number, "reason": str(error), "text": line.rstrip("\n")}
        self._sink.write(record_line(rejected))


def _pair_records(lines: Iterable[str], name: str, rejects: _Rejects) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield pair_record(line, f"{name}:{number}")
            except InvalidInputError as error:
                rejects.add(number, line, error)


def pair_record(row: str | Record, location: str) -> Record:
    """Read a pair, a JSON line or a record; an `InvalidInputError` names the location."""
    record = json_record(row, location) if isinstance(row, str) else row
    for field in ("query", "passage"):
        string_of(record, location, (field,))
    if not str(record["query"]).strip():
        raise InvalidInputError(f'{location}: "query" is empty')
    return record


def record_line(record: Record) -> str:
    """Give the JSON line of a record."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def _skip_done(partial: Path, records: Iterator[Record]) -> int:
    """Advance `records` past the completed ones."""
    done = 0
    for done, line in enumerate(complete_lines(partial), 1):  # noqa: B007 - the number of lines
        record, old = next(records, None), json.loads(line)
        if record is None or any(record[key] != old.get(key) for key in ("query", "passage")):
            raise InvalidInputError(f"{partial} holds scores of other pairs; remove it, or give another --out")
    return done
