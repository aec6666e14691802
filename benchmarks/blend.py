"""Print what the retriever's score adds to the reranker's, for BM25, a dense and a hybrid first stage.

python benchmarks/blend.py --fit DATA --fit DATA --report DATA --report DATA --scores FOLDER

DATA are folders in BEIR's layout. The weight of each first stage is fitted on the sets of --fit, and the gain over
reranking alone is reported on those of --report, with 95% intervals. A pair that several first stages find is scored
once. FOLDER keeps the scores of each set and the embeddings, so a run that was stopped goes on. Pairs are truncated at
--max-length tokens.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

from mistral_rerank import LocalReranker
from mistral_rerank.data_files.atomic import write_json
from mistral_rerank.evaluation.datasets import BeirDataset, load_beir
from mistral_rerank.evaluation.evaluate import first_stage_run, measure, score_candidates
from mistral_rerank.evaluation.first_stage import FirstStage, open_first_stage
from mistral_rerank.evaluation.run_files import Run
from mistral_rerank.evaluation.weights import Candidates, blended_runs, compare, fit_weight
from mistral_rerank.evaluation.workspace import EvaluationSettings, Scored

AT_ONCE = 16
Results = dict[str, tuple[BeirDataset, Run, dict[str, Scored]]]
Scores = dict[str, dict[str, tuple[float, float]]]
"""Logit and probability, by question and passage."""


def candidates_of(folder: Path, stages: dict[str, FirstStage], options: argparse.Namespace) -> Results:
    """Give the candidates of a set and their scores, by first stage."""
    dataset = load_beir(folder)
    settings = EvaluationSettings(data=(folder,), queries=options.queries, top_k=options.top_k)
    runs = {name: first_stage_run(dataset, stage, settings, progress=quiet) for name, stage in stages.items()}
    union = {
        query: list(dict.fromkeys(passage for run in runs.values() for passage, _ in run[query]))
        for query in next(iter(runs.values()))
    }
    with LocalReranker(options.model, max_length=options.max_length) as reranker:
        texts = [[dataset.queries[query], *map(dataset.corpus.get, passages)] for query, passages in union.items()]
        used = json.dumps([reranker.weights_checksum(), options.max_length, texts])
        file = options.scores / f"{dataset.name}-{hashlib.sha256(used.encode()).hexdigest()[:16]}.json"
        if not file.exists():
            write_json(file, score(dataset, union, reranker))
    scores = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: (dataset, run, {query: scored(dataset, query, run, scores[query]) for query in run})
        for name, run in runs.items()
    }


def score(dataset: BeirDataset, union: dict[str, list[str]], reranker: LocalReranker) -> Scores:
    """Score each pair that any of the first stages found."""
    run = {query: [(passage, 0.0) for passage in passages] for query, passages in union.items()}
    scores = {}
    for query, values, _ in score_candidates(dataset, run, reranker, at_once=AT_ONCE):
        pairs = zip(union[query], values, strict=True)
        scores[query] = {passage: (value.logit, value.probability) for passage, value in pairs}
    print(f"{dataset.name}: {sum(map(len, union.values()))} pairs", file=sys.stderr, flush=True)
    return scores


def scored(dataset: BeirDataset, query: str, run: Run, scores: dict[str, tuple[float, float]]) -> Scored:
    """Give the scores of one question's candidates in the order of the first stage."""
    passages = [passage for passage, _ in run[query]]
    return Scored(
        logits=tuple(scores[passage][0] for passage in passages),
        probabilities=tuple(scores[passage][1] for passage in passages),
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
    parser.add_argument("--scores", type=Path, required=True, help="folder for what is computed")
    parser.add_argument("--queries", type=int, default=40, help="of each set")
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--embedding-model", default="all-MiniLM-L6-v2", help="of the dense and the hybrid stage")
    options = parser.parse_args()
    names = {
        "bm25": "BM25",
        f"dense:{options.embedding_model}": "dense",
        f"hybrid:{options.embedding_model}": "hybrid",
    }
    options.scores.mkdir(parents=True, exist_ok=True)
    stages = {name: open_first_stage(name, vectors=options.scores) for name in names}
    fitted, reported = (
        {folder.name: candidates_of(folder, stages, options) for folder in folders}
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
