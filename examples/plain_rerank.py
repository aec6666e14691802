"""Rerank in plain Python: BM25 finds ten passages for each question, mini reorders them.

pip install '.[local,eval]'
python examples/plain_rerank.py [FOLDER]

FOLDER is a BEIR folder with one relevant passage for each question; without it, the data of `mistral-rerank demo`.
"""

import sys
from pathlib import Path

from mistral_rerank import open_reranker
from mistral_rerank.demo import FACTS
from mistral_rerank.evaluation.datasets import load_beir
from mistral_rerank.evaluation.first_stage import BM25

SHOWN = slice(0, None, 14)
"""Every 14th question is printed."""


def main() -> None:
    """Print some questions before and after reranking, and the positions of all answers."""
    facts = load_beir(Path(sys.argv[1]) if len(sys.argv) > 1 else FACTS)
    rankings = BM25(facts.corpus).search(list(facts.queries.values()), k=10)
    positions_before: list[int] = []
    positions_after: list[int] = []
    shown = list(facts.queries)[SHOWN]
    with open_reranker() as reranker:
        for (query_id, query), ranking in zip(facts.queries.items(), rankings, strict=True):
            (answer,) = facts.positives(query_id)
            before = [passage_id for passage_id, _ in ranking]
            reranked = reranker.rank(query, [facts.corpus[passage_id] for passage_id in before])
            after = [before[passage.index] for passage in reranked]
            positions_before.append(before.index(answer))
            positions_after.append(after.index(answer))
            if query_id in shown:
                print(f"{query}   (* answers it)")
                print(f"     {'before, by word overlap':50} after, by {reranker.model_name}")
                for old, new, passage in zip(before[:3], after[:3], reranked, strict=False):
                    left = f"{'*' if old == answer else ' '} {facts.corpus[old]}"
                    right = f"{'*' if new == answer else ' '} {passage.score.probability:.2f} {facts.corpus[new]}"
                    print(f"   {left:50.50}   {right:.60}")
                print()
    for count, name in ((1, "the first passage"), (2, "one of the first two")):
        answered = [sum(at < count for at in positions) for positions in (positions_before, positions_after)]
        print(f"answered by {name}: {answered[0]} of {len(rankings)} before, {answered[1]} after")
    mrr = [sum(1 / (1 + at) for at in positions) / len(rankings) for positions in (positions_before, positions_after)]
    print(f"mean reciprocal rank of the answer: {mrr[0]:.2f} before, {mrr[1]:.2f} after")


if __name__ == "__main__":
    main()
