"""Scores the pairs of a file; a stopped run resumes."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING

from mistral_rerank.data_files.atomic import check_resume_settings, open_append, read_complete_lines
from mistral_rerank.data_files.text import Record, json_record, string_of
from mistral_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from mistral_rerank.reranker import Reranker

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
) -> int:
    """Score JSON lines of {"query", "passage"} into the same lines with "logit" and "probability"; give their number.

    Blocks are appended to `<out>.partial`, which a stopped run resumes from. It becomes `out` when it is complete.

    Args:
        reranker: scores the pairs.
        pairs: the lines of the input.
        name: of the input, for errors.
        out: the file to write; it must not exist yet.
        settings: of the reranker; a run resumes only with the same settings.
        progress: called after each block with its number of pairs.

    Raises:
        InvalidInputError: a line is invalid, `out` exists, or the partial file has other pairs.
        SettingsError: the partial file is from another model or other settings.

    """
    if out.exists():
        raise InvalidInputError(f"{out} exists; give another --out, or remove it")
    partial, settings_file = (out.with_name(out.name + end) for end in (".partial", ".settings"))
    if not partial.exists():
        settings_file.unlink(missing_ok=True)  # of a run whose partial file was removed
    check_resume_settings(settings_file, {"model": reranker.model_name, **settings}, holder=partial)
    records = _pair_records(pairs, name)
    lines = read_complete_lines(partial)
    for line in lines:
        record, old = next(records, None), json.loads(line)
        if record is None or any(record[key] != old.get(key) for key in ("query", "passage")):
            raise InvalidInputError(f"{partial} holds scores of other pairs; remove it, or give another --out")
    done = len(lines)
    progress(done)
    with open_append(partial) as sink:
        for scored in _score_records(reranker, records):
            sink.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in scored))
            sink.flush()
            done += len(scored)
            progress(len(scored))
    partial.replace(out)
    settings_file.unlink()
    return done


def score_lines(reranker: Reranker, pairs: Iterable[str], name: str) -> Iterator[Record]:
    """Score JSON lines of {"query", "passage"} block by block."""
    for scored in _score_records(reranker, _pair_records(pairs, name)):
        yield from scored


def _score_records(reranker: Reranker, records: Iterator[Record]) -> Iterator[list[Record]]:
    """Add "logit" and "probability" to records, block by block."""
    while block := list(islice(records, BLOCK)):
        scores = reranker.score_pairs([(str(record["query"]), str(record["passage"])) for record in block])
        yield [
            record | {"logit": score.logit, "probability": score.probability}
            for record, score in zip(block, scores, strict=True)
        ]


def _pair_records(lines: Iterable[str], name: str) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            location = f"{name}:{number}"
            record = json_record(line, location)
            for field in ("query", "passage"):
                string_of(record, location, (field,))
            if not str(record["query"]).strip():
                raise InvalidInputError(f'{location}: "query" is empty')
            yield record
