"""Rerank in plain Python: BM25 finds ten passages for each question, mini reorders them.

pip install 'mistral-rerank[local,eval]'
"""

from pathlib import Path

from mistral_rerank import open_reranker
from mistral_rerank.evaluation.datasets import load_beir
from mistral_rerank.evaluation.first_stage import BM25

SHOWN = ("q01", "q14", "q29")


def main() -> None:
    """Print three questions before and after, and where the answers to all of them stand."""
    facts = load_beir(Path(__file__).parent / "facts")
    found = BM25(facts.corpus).search(list(facts.queries.values()), k=10)
    places_before: list[int] = []
    places_after: list[int] = []
    with open_reranker() as reranker:
        for (query_id, query), ranking in zip(facts.queries.items(), found, strict=True):
            (answer,) = facts.positives(query_id)
            before = [passage_id for passage_id, _ in ranking]
            places = reranker.rank(query, [facts.corpus[passage_id] for passage_id in before])
            after = [before[place.index] for place in places]
            places_before.append(before.index(answer))
            places_after.append(after.index(answer))
            if query_id in SHOWN:
                print(f"{query}   (* answers it)")
                print(f"     {'before, by shared words':50} after, by {reranker.model_name}")
                for old, new, place in zip(before[:3], after[:3], places, strict=False):
                    left = f"{'*' if old == answer else ' '} {facts.corpus[old]}"
                    right = f"{'*' if new == answer else ' '} {place.score.probability:.2f} {facts.corpus[new]}"
                    print(f"   {left:50.50}   {right:.60}")
                print()
    for count, name in ((1, "the first passage"), (2, "one of the first two")):
        answered = [sum(place < count for place in places) for places in (places_before, places_after)]
        print(f"answered by {name}: {answered[0]} of {len(found)} before, {answered[1]} after")
    ranks = [sum(1 / (1 + place) for place in places) / len(found) for places in (places_before, places_after)]
    print(f"mean reciprocal rank of the answer: {ranks[0]:.2f} before, {ranks[1]:.2f} after")


if __name__ == "__main__":
    main()
