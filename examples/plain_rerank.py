"""Rerank in plain Python: BM25 finds ten passages for each question, mini puts the answer first.

pip install 'mistral-rerank[local,eval]'
"""

from pathlib import Path

from mistral_rerank import open_reranker
from mistral_rerank.evaluation.beir import load_beir
from mistral_rerank.evaluation.first_stage import BM25

SHOWN = ("q01", "q14", "q29")


def main() -> None:
    """Print three questions before and after, and how many of all are answered by the first passage."""
    facts = load_beir(Path(__file__).parent / "facts")
    found = BM25(facts.corpus).search(list(facts.queries.values()), k=10)
    first_before = first_after = 0
    with open_reranker() as reranker:
        for (query_id, query), ranking in zip(facts.queries.items(), found, strict=True):
            (answer,) = facts.positives(query_id)
            before = [passage_id for passage_id, _ in ranking]
            places = reranker.rank(query, [facts.corpus[passage_id] for passage_id in before])
            after = [before[place.index] for place in places]
            first_before += before[0] == answer
            first_after += after[0] == answer
            if query_id in SHOWN:
                print(f"{query}   (* answers it)")
                print(f"     {'before, by shared words':50} after, by {reranker.model_name}")
                for old, new, place in zip(before[:3], after[:3], places, strict=False):
                    left = f"{'*' if old == answer else ' '} {facts.corpus[old]}"
                    right = f"{'*' if new == answer else ' '} {place.score.probability:.2f} {facts.corpus[new]}"
                    print(f"   {left:50.50}   {right:.60}")
                print()
    print(f"answered by the first passage: {first_before} of {len(found)} before, {first_after} after")


if __name__ == "__main__":
    main()
