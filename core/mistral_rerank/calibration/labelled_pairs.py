"""Labelled pairs to calibrate on: from BEIR folders and a first stage, or from JSON lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from mistral_rerank.data_files.text import text_lines
from mistral_rerank.errors import InvalidInputError
from mistral_rerank.evaluation.datasets import load_beir
from mistral_rerank.evaluation.evaluate import first_stage_run, score_candidates

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from mistral_rerank.evaluation.evaluate import Notify
    from mistral_rerank.evaluation.first_stage import FirstStage
    from mistral_rerank.evaluation.settings import EvaluationSettings
    from mistral_rerank.reranker import Reranker

BLOCK = 256
"""Pairs of a file that are scored in one call."""
EXPECTED = 'expected "query", "passage" and "label" (0 or 1), or a line of scores/SET.jsonl from evaluate'


@dataclass(frozen=True, slots=True)
class LabelledPairs:
    """Logits of pairs with their labels.

    Attributes:
        name: of the data set or file.
        logits: (pairs,), uncalibrated.
        labels: (pairs,), 1 for relevant, else 0.

    """

    name: str
    logits: tuple[float, ...]
    labels: tuple[int, ...]


def pooled(name: str, collections: Iterable[LabelledPairs]) -> LabelledPairs:
    """Concatenate collections."""
    collections = list(collections)
    return LabelledPairs(
        name,
        tuple(logit for pairs in collections for logit in pairs.logits),
        tuple(label for pairs in collections for label in pairs.labels),
    )


def read_pairs(
    source: Path, reranker: Reranker, stage: FirstStage, settings: EvaluationSettings, *, notify: Notify
) -> LabelledPairs:
    """Score the candidates of a BEIR folder, or the pairs of a file.

    Args:
        source: a BEIR folder; or JSON lines of pairs, of which those with a "logit" are not scored again; or a
            `scores/SET.jsonl` of an evaluation.
        reranker: scores the pairs.
        stage: finds the candidates of a folder's questions.
        settings: how many questions, and how many candidates of each.
        notify: receives the progress.

    Raises:
        InvalidInputError: the source is not of the format.

    """
    if not source.is_dir():
        return _of_file(source, reranker, notify)
    dataset = load_beir(source.resolve(), split=settings.split)
    run = first_stage_run(
        dataset, stage, settings, progress=lambda done, total: notify(f"{dataset.name}: first stage", done, total)
    )
    logits: list[float] = []
    labels: list[int] = []
    scored = score_candidates(dataset, run, reranker, at_once=settings.questions_at_once)
    for done, (query, scores, _) in enumerate(scored, start=1):
        logits += [score.logit for score in scores]
        labels += dataset.labels(query, [passage for passage, _ in run[query]])
        notify(f"{dataset.name}: scoring", done, len(run))
    return LabelledPairs(dataset.name, tuple(logits), tuple(labels))


def _of_file(file: Path, reranker: Reranker, notify: Notify) -> LabelledPairs:
    logits: list[float] = []
    labels: list[int] = []
    records = _records(text_lines(file), file)
    while block := list(islice(records, BLOCK)):
        unscored = [record for record in block if "logit" not in record]
        scores = reranker.score_pairs([(str(r["query"]), str(r["passage"])) for r in unscored]) if unscored else []
        new = iter(scores)
        logits += [float(r["logit"]) if "logit" in r else next(new).logit for r in block]  # type: ignore[arg-type]
        labels += [int(bool(record["label"])) for record in block]
        notify(f"{file.name}: scoring", len(labels), len(labels))
    return LabelledPairs(file.stem, tuple(logits), tuple(labels))


def _records(lines: Iterable[str], file: Path) -> Iterator[dict[str, object]]:
    """Yield one record per pair."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "logits" in record:
                scored = zip(record["logits"], record["labels"], strict=True)
                pairs: list[dict[str, object]] = [{"logit": float(a), "label": b} for a, b in scored]
            else:
                pairs = [{key: record[key] for key in ("query", "passage", "label", "logit") if key in record}]
                if "logit" in record:
                    float(record["logit"])
            wrong = any(record["label"] not in (0, 1) for record in pairs)
            wrong |= any(
                "logit" not in record and not (isinstance(record["query"], str) and isinstance(record["passage"], str))
                for record in pairs
            )
        except (ValueError, LookupError, TypeError) as error:
            raise InvalidInputError(f"{file}:{number}: {EXPECTED}") from error
        if wrong:
            raise InvalidInputError(f"{file}:{number}: {EXPECTED}")
        yield from pairs
