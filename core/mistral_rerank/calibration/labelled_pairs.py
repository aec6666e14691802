"""Labelled pairs to calibrate on: from BEIR folders and a first stage, or from JSON lines."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any

from mistral_rerank.calibration.fit import LabelledPairs
from mistral_rerank.data_files.text import text_lines
from mistral_rerank.errors import InvalidInputError
from mistral_rerank.evaluation.datasets import load_beir
from mistral_rerank.evaluation.evaluate import first_stage_run, score_candidates

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mistral_rerank.evaluation.evaluate import Notify
    from mistral_rerank.evaluation.first_stage import FirstStage
    from mistral_rerank.evaluation.workspace import EvaluationSettings
    from mistral_rerank.reranker import Reranker
    from mistral_rerank.scores import Pair

BLOCK = 256
"""Pairs of a file that are scored in one call."""
EXPECTED = 'expected "query", "passage" and "label" (0 or 1), or a line of scores/SET.jsonl from evaluate'


def read_pairs(
    source: Path, reranker: Reranker, stage: FirstStage, settings: EvaluationSettings, *, notify: Notify
) -> LabelledPairs:
    """Score the candidates of a BEIR folder, or the pairs of a file.

    Args:
        source: a BEIR folder; or JSON lines of pairs, of which those with a "logit" are not scored again; or a
            `scores/SET.jsonl` of an evaluation.
        reranker: scores the pairs.
        stage: retrieves the candidates of a folder's questions.
        settings: how many questions, and how many candidates of each.
        notify: receives the progress.

    Raises:
        InvalidInputError: the source is not of the format.

    """
    logits: list[float] = []
    labels: list[int] = []
    if not source.is_dir():
        pairs = _pairs(source)
        while block := list(islice(pairs, BLOCK)):
            unscored = [texts for _, logit, texts in block if logit is None]
            scores = iter(reranker.score_pairs(unscored) if unscored else [])
            logits += [next(scores).logit if logit is None else logit for _, logit, _ in block]
            labels += [label for label, _, _ in block]
            notify(f"{source.name}: scoring", len(labels), len(labels))
        return LabelledPairs(source.stem, tuple(logits), tuple(labels))
    dataset = load_beir(source.resolve(), split=settings.split)
    run = first_stage_run(
        dataset, stage, settings, progress=lambda done, total: notify(f"{dataset.name}: first stage", done, total)
    )
    scored = score_candidates(dataset, run, reranker, at_once=settings.questions_at_once)
    for done, (query, candidate_scores, _) in enumerate(scored, start=1):
        logits += [score.logit for score in candidate_scores]
        labels += dataset.labels(query, [passage for passage, _ in run[query]])
        notify(f"{dataset.name}: scoring", done, len(run))
    return LabelledPairs(dataset.name, tuple(logits), tuple(labels))


def _pairs(file: Path) -> Iterator[tuple[int, float | None, Pair]]:
    """Yield the label of each pair, its logit or None, and its texts."""
    for number, line in enumerate(text_lines(file), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records = [record]
            if "logits" in record:
                scored = zip(record["logits"], record["labels"], strict=True)
                records = [{"logit": logit, "label": label} for logit, label in scored]
            pairs = [_pair(record) for record in records]
        except (ValueError, LookupError, TypeError) as error:
            raise InvalidInputError(f"{file}:{number}: {EXPECTED}") from error
        yield from pairs


def _pair(record: dict[str, Any]) -> tuple[int, float | None, Pair]:
    label, query, passage = record["label"], record.get("query"), record.get("passage")
    if label not in (0, 1):
        raise ValueError(label)
    if "logit" in record:
        return int(label), float(record["logit"]), ("", "")
    if not isinstance(query, str) or not isinstance(passage, str):
        raise TypeError(record)
    return int(label), None, (query, passage)
