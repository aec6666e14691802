"""Evaluate a reranker: first stage, reranking, measures, files."""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_rerank.data_files.atomic import atomic_write, open_append, write_json
from mistral_rerank.errors import SettingsError
from mistral_rerank.evaluation.datasets import load_beir
from mistral_rerank.evaluation.encoders import BiEncoderReranker
from mistral_rerank.evaluation.first_stage import check_passages, open_first_stage
from mistral_rerank.evaluation.metrics import MEASURES, mean, per_query
from mistral_rerank.evaluation.report import write_report
from mistral_rerank.evaluation.results import Example, Figures, SetResult, Shown, depths, figures, timing
from mistral_rerank.evaluation.run_files import distinct, read_run, write_run
from mistral_rerank.evaluation.weights import blended_runs, compare, fit_weight, read_candidates
from mistral_rerank.evaluation.workspace import VECTORS, Scored, append_scores, partial_folder, resume_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mistral_rerank.evaluation.datasets import BeirDataset
    from mistral_rerank.evaluation.first_stage import FirstStage
    from mistral_rerank.evaluation.run_files import Run
    from mistral_rerank.evaluation.workspace import EvaluationSettings
    from mistral_rerank.reranker import Reranker
    from mistral_rerank.scores import Score

    Notify = Callable[[str, int, int], None]

EXAMPLES = 10
"""Number of worst losses, and of best gains, that the report shows per set."""
SHOWN = 3
"""Passages shown per example, before and after."""
TIMED_QUERIES = 3
"""Questions that are reranked again at every depth to measure the latency."""


def evaluate(
    reranker: Reranker,
    settings: EvaluationSettings,
    out: Path,
    *,
    reranker_settings: Mapping[str, object] | None = None,
    device: str | None = None,
    notify: Notify = lambda _what, _done, _total: None,
) -> list[Figures]:
    """Compare the first stage with its reranked candidates; give the figures of every set, then their mean.

    Args:
        reranker: any reranker.
        settings: of the evaluation.
        out: the folder to write; it must not exist. A stopped evaluation resumes from `<out>.partial`.
        reranker_settings: stored with the results; a run resumes only with the same ones.
        device: of a dense first stage; None for the best available.
        notify: receives the step, the number of items done, and the total.

    Raises:
        InvalidInputError: a data set or run file is invalid.
        SettingsError: `out` exists, or the partial folder has other settings.

    """
    folders = [Path(folder).resolve() for folder in settings.data]
    names = [folder.name for folder in folders]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise SettingsError(f"two data folders are called {repeated!r}; rename one, its name is that of its results")
    recorded = settings.model_dump(mode="json", exclude={"fit_weight"} if settings.fit_weight is None else None) | {
        "model": reranker.model_name,
        "reranker": dict(reranker_settings or {}),
    }
    weight = None if settings.fit_weight is None else fit_weight(read_candidates(settings.fit_weight))
    with partial_folder(out, recorded | {"data": [str(folder) for folder in folders]}) as work:
        stage = open_first_stage(
            settings.first_stage,
            query_prefix=settings.query_prefix,
            passage_prefix=settings.passage_prefix,
            device=device,
            vectors=work / VECTORS,
        )
        results: list[SetResult] = []
        qrels: dict[str, Mapping[str, Mapping[str, int]]] = {}
        reranked: dict[str, Run] = {}
        blended: dict[str, Run] = {}
        latencies: dict[int, float] = {}
        for folder in folders:
            dataset = load_beir(folder, split=settings.split)
            before = _candidates(dataset, stage, settings, work, notify)
            scored = _scores(dataset, before, reranker, work, at_once=settings.questions_at_once, notify=notify)
            result, after = measure(dataset, before, scored, top_k=settings.top_k)
            write_run(after, work / "reranked" / f"{dataset.name}.trec", tag="reranked")
            results.append(result)
            if weight is not None:
                qrels[dataset.name] = {query: dataset.qrels[query] for query in before}
                reranked[dataset.name], blended[dataset.name] = after, blended_runs(before, scored, weight)
            latencies = latencies or _latencies(dataset, before, reranker, settings.top_k)
        all_figures = figures(results, top_k=settings.top_k, seed=settings.seed)
        recorded["data"] = names
        if settings.fit_weight is not None:
            recorded["fit_weight"] = settings.fit_weight.resolve().name
        times = timing(results, latencies)
        written = {"settings": recorded, "figures": [asdict(each) for each in all_figures]}
        if weight is not None:
            comparison = compare(qrels, reranked, blended, weight=weight, seed=settings.seed)
            written["blended"] = [asdict(each) for each in comparison]
        write_json(work / "results.json", written)
        write_json(work / "timing.json", times)
        with atomic_write(work / "queries.jsonl") as lines:
            for result in results:
                for query, values in result.reranked.items():
                    record = {"set": result.name, "query": query, "first_stage": result.first_stage[query]}
                    lines.write(json.dumps(record | {"reranked": values}, ensure_ascii=False) + "\n")
        write_report(all_figures, results, recorded, times, work / "report.html")
    return all_figures


def sample_queries(dataset: BeirDataset, count: int | None, *, seed: int) -> list[str]:
    """Sample `count` judged questions with the seed; None for all."""
    ids = sorted(dataset.queries)
    return ids if count is None or count >= len(ids) else random.Random(seed).sample(ids, count)  # noqa: S311


def first_stage_run(
    dataset: BeirDataset, stage: FirstStage, settings: EvaluationSettings, *, progress: Callable[[int, int], None]
) -> Run:
    """Find the candidates of the sampled questions."""
    queries = sample_queries(dataset, settings.queries, seed=settings.seed)
    rankings = stage.search(dataset, queries, k=settings.top_k + settings.drop_same_id, progress=progress)
    run = {}
    for query, ranking in zip(queries, rankings, strict=True):
        candidates = [hit for hit in ranking if not (settings.drop_same_id and hit[0] == query)]
        run[query] = distinct(candidates[: settings.top_k])
    return run


def score_candidates(
    dataset: BeirDataset, run: Run, reranker: Reranker, *, at_once: int, skip: int = 0
) -> Iterator[tuple[str, list[Score], float]]:
    """Score the candidates of every question, `at_once` questions per call.

    A model whose prompt puts the passage first computes a passage once for all questions of a call. The first `skip`
    questions are left out, but calls are composed as without it, so that scores are bit-identical.

    Yields:
        The question's id, its candidates' scores, and its share of the call's seconds.

    """
    queries = list(run)
    for start in range(skip - skip % at_once, len(queries), at_once):
        block = queries[start : start + at_once]
        pairs = [(dataset.queries[query], dataset.corpus[passage]) for query in block for passage, _ in run[query]]
        start_time = time.perf_counter()
        scores = iter(reranker.score_pairs(pairs) if pairs else [])
        seconds_per_pair = (time.perf_counter() - start_time) / max(1, len(pairs))
        for number, query in enumerate(block, start):
            query_scores = list(itertools.islice(scores, len(run[query])))
            if number >= skip:
                yield query, query_scores, seconds_per_pair * len(query_scores)


def reordered(ranking: Sequence[tuple[str, float]], logits: Sequence[float], *, depth: int) -> list[tuple[str, float]]:
    """Sort the first `depth` passages by (-logit, index); the others follow in their order.

    The scores are distinct: logits, or negative ranks if not all are reranked.
    """
    order = sorted(range(min(depth, len(ranking))), key=lambda index: (-logits[index], index))
    if depth >= len(ranking):
        return distinct((ranking[index][0], logits[index]) for index in order)
    order += range(depth, len(ranking))
    return [(ranking[index][0], float(-rank)) for rank, index in enumerate(order)]


def measure(dataset: BeirDataset, before: Run, scored: Mapping[str, Scored], *, top_k: int) -> tuple[SetResult, Run]:
    """Measure the candidates of a set before and after reranking; also give the reranked run."""
    qrels = {query: dataset.qrels[query] for query in before}
    after = {query: reordered(before[query], scored[query].logits, depth=top_k) for query in before}
    by_depth = {}
    for depth in depths(top_k):
        values = per_query(qrels, {q: reordered(before[q], scored[q].logits, depth=depth) for q in before})
        by_depth[depth] = {name: mean(values, name) for name in MEASURES}
    old, new = (per_query(qrels, run, recall_at=top_k) for run in (before, after))
    gains = {query: new[query]["nDCG@10"] - old[query]["nDCG@10"] for query in before}
    rising = sorted(gains, key=lambda query: (gains[query], query))
    losses = [query for query in rising[:EXAMPLES] if gains[query] < 0]
    best = [query for query in rising[::-1][:EXAMPLES] if gains[query] > 0]

    def top(run: Run, query: str) -> tuple[Shown, ...]:
        passages = [passage for passage, _ in run[query][:SHOWN]]
        return tuple(Shown(passage, dataset.corpus[passage], qrels[query].get(passage)) for passage in passages)

    result = SetResult(
        name=dataset.name,
        passages=len(dataset.corpus),
        first_stage=old,
        reranked=new,
        by_depth=by_depth,
        probabilities=tuple(p for query in before for p in scored[query].probabilities),
        labels=tuple(label for query in before for label in scored[query].labels),
        seconds=tuple(scored[query].seconds for query in before),
        examples=tuple(
            Example(query, dataset.queries[query], gains[query], top(before, query), top(after, query))
            for query in [*losses, *best]
        ),
    )
    return result, after


def _candidates(
    dataset: BeirDataset, stage: FirstStage, settings: EvaluationSettings, work: Path, notify: Notify
) -> Run:
    """Retrieve the candidates, or read those of a stopped run."""
    file = work / "first_stage" / f"{dataset.name}.trec"
    if not file.exists():
        what = f"{dataset.name}: first stage"
        retrieved = first_stage_run(dataset, stage, settings, progress=lambda done, total: notify(what, done, total))
        write_run(retrieved, file, tag="first_stage")
    run = read_run(file)
    check_passages(run.values(), dataset, file)
    return {query: run.get(query, []) for query in sample_queries(dataset, settings.queries, seed=settings.seed)}


def _scores(
    dataset: BeirDataset, run: Run, reranker: Reranker, work: Path, *, at_once: int, notify: Notify
) -> dict[str, Scored]:
    """Score the candidates of every question that a stopped run did not score."""
    file, what = work / "scores" / f"{dataset.name}.jsonl", f"{dataset.name}: reranking"
    done = resume_scores(file, run)
    notify(what, len(done), len(run))
    if len(done) == len(run):
        return done
    reranker.score_pairs([("warm", "up")])
    with open_append(file) as lines:
        for query, scores, seconds in score_candidates(dataset, run, reranker, at_once=at_once, skip=len(done)):
            passages = [passage for passage, _ in run[query]]
            done[query] = Scored(
                logits=tuple(score.logit for score in scores),
                probabilities=tuple(score.probability for score in scores),
                labels=tuple(dataset.labels(query, passages)),
                seconds=seconds,
            )
            append_scores(lines, query, passages, done[query])
            notify(what, len(done), len(run))
    return done


def _latencies(dataset: BeirDataset, run: Run, reranker: Reranker, top_k: int) -> dict[int, float]:
    """Give the median seconds to rerank a question, for every depth."""
    if isinstance(reranker, BiEncoderReranker):
        return {}  # its embeddings are cached, so a second run takes no time
    full = [query for query in run if len(run[query]) >= top_k][:TIMED_QUERIES]
    medians = {}
    for depth in depths(top_k)[1:] if full else []:
        seconds = []
        for query in full:
            pairs = [(dataset.queries[query], dataset.corpus[passage]) for passage, _ in run[query][:depth]]
            start = time.perf_counter()
            reranker.score_pairs(pairs)
            seconds.append(time.perf_counter() - start)
        medians[depth] = statistics.median(seconds)
    return medians
