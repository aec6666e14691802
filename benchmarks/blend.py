"""Print what the retriever's score adds to the reranker's, for BM25, a dense and a hybrid first stage.

python benchmarks/blend.py --fit DATA --fit DATA --report DATA --report DATA [--queries 40] [--top-k 20]

DATA are folders in BEIR's layout. The weight of each first stage is fitted on the sets of --fit, and the gain over
reranking alone is reported on those of --report, with 95% intervals. A pair that several first stages find is scored
once. Pairs are truncated at --max-length tokens.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

from mistral_rerank import LocalReranker, Reranker
from mistral_rerank.evaluation.datasets import BeirDataset, load_beir
from mistral_rerank.evaluation.evaluate import first_stage_run, measure, score_candidates
from mistral_rerank.evaluation.first_stage import FirstStage, open_first_stage
from mistral_rerank.evaluation.run_files import Run
from mistral_rerank.evaluation.weights import Candidates, blended_runs, compare, fit_weight
from mistral_rerank.evaluation.workspace import EvaluationSettings, Scored

AT_ONCE = 16
Results = dict[str, tuple[BeirDataset, Run, dict[str, Scored]]]


def score(folder: Path, stages: dict[str, FirstStage], reranker: Reranker, queries: int, top_k: int) -> Results:
    """Give the candidates of a set and their scores, by first stage."""
    dataset = load_beir(folder)
    settings = EvaluationSettings(data=(folder,), queries=queries, top_k=top_k)
    runs = {name: first_stage_run(dataset, stage, settings, progress=quiet) for name, stage in stages.items()}
    union: Run = {}
    for query in next(iter(runs.values())):
        found = itertools.chain.from_iterable(run[query] for run in runs.values())
        union[query] = [(passage, 0.0) for passage in dict.fromkeys(passage for passage, _ in found)]
    scores = {}
    for query, values, _ in score_candidates(dataset, union, reranker, at_once=AT_ONCE):
        scores[query] = dict(zip((passage for passage, _ in union[query]), values, strict=True))
    print(f"{dataset.name}: {sum(map(len, union.values()))} pairs", file=sys.stderr, flush=True)
    return {
        name: (dataset, run, {query: scored(dataset, query, run, scores[query]) for query in run})
        for name, run in runs.items()
    }


def scored(dataset: BeirDataset, query: str, run: Run, scores: dict) -> Scored:
    """Give the scores of one question's candidates in the order of the first stage."""
    passages = [passage for passage, _ in run[query]]
    return Scored(
        logits=tuple(scores[passage].logit for passage in passages),
        probabilities=tuple(scores[passage].probability for passage in passages),
        labels=tuple(dataset.labels(query, passages)),
        seconds=0.0,
    )


def candidates(run: Run, scores: dict[str, Scored]) -> list[Candidates]:
    """Give what the weight is fitted on."""
    return [
        Candidates(tuple(score for _, score in run[query]), scores[query].logits, scores[query].labels) for query in run
    ]


def quiet(_done: int, _total: int) -> None:
    """Show no progress of a first stage."""


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=Path, action="append", required=True)
    parser.add_argument("--report", type=Path, action="append", required=True)
    parser.add_argument("--queries", type=int, default=40, help="of each set")
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=288)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--embedding-model", default="all-MiniLM-L6-v2", help="of the dense and the hybrid stage")
    options = parser.parse_args()
    names = {
        "bm25": "BM25",
        f"dense:{options.embedding_model}": "dense",
        f"hybrid:{options.embedding_model}": "hybrid",
    }
    with (
        tempfile.TemporaryDirectory() as vectors,
        LocalReranker(options.model, max_length=options.max_length) as reranker,
    ):
        stages = {name: open_first_stage(name, vectors=Path(vectors)) for name in names}
        fitted, reported = (
            {folder.name: score(folder, stages, reranker, options.queries, options.top_k) for folder in folders}
            for folders in (options.fit, options.report)
        )
    print(f"{options.model}; {options.queries} questions of each set, top {options.top_k}; nDCG@10")
    print("| first stage | weight | set | reranked | blended | gain | 95% interval |\n|---|--:|---|--:|--:|--:|---|")
    for name, shown in names.items():
        weight = fit_weight({each: candidates(*stage[name][1:]) for each, stage in fitted.items()})
        qrels, reranked, blended = {}, {}, {}
        for each, stage in reported.items():
            dataset, run, scores = stage[name]
            qrels[each] = {query: dataset.qrels[query] for query in run}
            reranked[each] = measure(dataset, run, scores, top_k=options.top_k)[1]
            blended[each] = blended_runs(run, scores, weight)
        for row in compare(qrels, reranked, blended, weight=weight, seed=0):
            interval = f"{row.gain.mean:+.3f} | {row.gain.low:+.3f} to {row.gain.high:+.3f}"
            print(f"| {shown} | {weight:.2f} | {row.name} | {row.reranked:.3f} | {row.blended:.3f} | {interval} |")


if __name__ == "__main__":
    main()
