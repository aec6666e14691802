"""Print what a reranker adds to BM25 on BEIR folders: nDCG@10, Recall@1 and Recall@5, before and after.

python benchmarks/quality.py FOLDER ... [--model mini] [--depth 20] [--queries 300] [--dtype float32]
"""

import argparse
import random
import time
from pathlib import Path

import pytrec_eval

from mistral_rerank import open_reranker
from mistral_rerank.evaluation.beir import load_beir
from mistral_rerank.evaluation.first_stage import BM25

METRICS = {"ndcg_cut_10": "nDCG@10", "recall_1": "R@1", "recall_5": "R@5"}


def mean_metrics(qrels: dict[str, dict[str, int]], run: dict[str, list[str]]) -> dict[str, float]:
    """Average over every judged query; one without results counts 0."""
    scored = {query: {doc: float(-place) for place, doc in enumerate(docs)} for query, docs in run.items()}
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.1,5"}).evaluate(scored)
    return {key: sum(found.get(query, {}).get(key, 0.0) for query in qrels) / len(qrels) for key in METRICS}


def main() -> None:
    """Print one row a data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--depth", type=int, default=20, help="passages of BM25 that are reranked")
    parser.add_argument("--queries", type=int, help="this many questions of a set, drawn with seed 0")
    options = parser.parse_args()
    print(f"{'set':16} {'queries':>7}  " + "  ".join(f"{name:>17}" for name in METRICS.values()) + "  pairs/s")
    with open_reranker(options.model, dtype=options.dtype) as reranker:
        reranker.score_pairs([("warm", "up")])
        for folder in options.folders:
            data = load_beir(folder)
            ids = sorted(data.queries)
            if options.queries and options.queries < len(ids):
                ids = random.Random(0).sample(ids, options.queries)
            found = BM25(data.corpus).search([data.queries[query] for query in ids], k=options.depth)
            before = {query: [doc for doc, _ in ranking] for query, ranking in zip(ids, found, strict=True)}
            start, after = time.perf_counter(), {}
            for query, docs in before.items():
                places = reranker.rank(data.queries[query], [data.corpus[doc] for doc in docs])
                after[query] = [docs[place.index] for place in places]
            seconds = time.perf_counter() - start
            qrels = {query: data.qrels[query] for query in ids}
            old, new = mean_metrics(qrels, before), mean_metrics(qrels, after)
            cells = "  ".join(f"{old[key]:7.4f} -> {new[key]:.4f}" for key in METRICS)
            pairs = sum(map(len, before.values()))
            print(f"{folder.name:16} {len(ids):7}  {cells}  {pairs / seconds:7.1f}", flush=True)


if __name__ == "__main__":
    main()
