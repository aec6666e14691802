"""TREC run files: `query Q0 passage rank score tag`, one line a result.

trec_eval and its kin sort by score and break ties by passage id, whatever the rank column says, and read scores as
32-bit floats. So scores are written such that they differ in 32 bits and a run keeps its order everywhere.

Source of the format: https://github.com/usnistgov/trec_eval
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistral_rerank.data_files.atomic import atomic_write
from mistral_rerank.data_files.text import text_lines
from mistral_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path


Ranking = list[tuple[str, float]]
"""Passage ids with their scores, best first."""

Run = dict[str, Ranking]
"""Query id -> its passages with distinct scores, best first."""


def distinct(ranking: Iterable[tuple[str, float]]) -> Ranking:
    """Lower scores by as little as it takes for them to fall strictly in 32 bits; the order is the input's."""
    import numpy as np

    lowered: Ranking = []
    last = np.float32(np.inf)
    for passage, score in ranking:
        last = min(np.float32(score), np.nextafter(last, np.float32(-np.inf)))
        lowered.append((passage, float(last)))
    return lowered


def write_run(run: Mapping[str, Sequence[tuple[str, float]]], file: Path, *, tag: str) -> None:
    """Write a run, whole or not at all; `distinct` has been applied to its rankings.

    Raises:
        InvalidInputError: an id holds white space, which the format cannot express.

    """
    import numpy as np

    ids = (name for query, ranking in run.items() for name in (query, *(passage for passage, _ in ranking)))
    if wrong := next((name for name in ids if len(name.split()) != 1), None):
        raise InvalidInputError(f"the id {wrong!r} holds white space, which a TREC run cannot express; rename it")
    with atomic_write(file) as lines:
        for query, ranking in run.items():
            for rank, (passage, score) in enumerate(ranking, start=1):
                lines.write(f"{query} Q0 {passage} {rank} {np.float32(score)!s} {tag}\n")


def read_run(file: Path) -> Run:
    """Read a run; its rankings are sorted by score, equal ones by the rank column.

    Raises:
        InvalidInputError: a line is not of the format, or repeats a passage; it names the line.

    """
    return {query: distinct(ranking) for query, ranking in read_scores(file).items()}


def read_scores(file: Path) -> Run:
    """Read a run with the scores of the file, which may be equal; without numpy, which the base install lacks."""
    rows: dict[str, dict[str, tuple[float, int]]] = {}
    for number, line in enumerate(text_lines(file), start=1):
        if not line.strip():
            continue
        try:
            query, _, passage, rank, score, _ = line.split()
            row = float(score), int(rank)
        except ValueError as error:
            raise InvalidInputError(f"{file}:{number}: expected 'query Q0 passage rank score tag'") from error
        if passage in rows.setdefault(query, {}):
            raise InvalidInputError(f"{file}:{number}: passage {passage!r} of query {query!r} comes twice")
        rows[query][passage] = row
    run = {}
    for query, passages in rows.items():
        by_score = sorted(passages.items(), key=lambda item: (-item[1][0], item[1][1]))
        run[query] = [(passage, score) for passage, (score, _) in by_score]
    return run
