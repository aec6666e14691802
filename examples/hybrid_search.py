"""Hybrid search in plain Python: words and characters are searched apart, fused by reciprocal rank, and reranked.

pip install '.[local,eval]' scikit-learn

BM25 finds the right words, the vectors also words with another ending or a typo. With an embedding model in the place
of `vectors`, they find other words of the same meaning.
"""

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from mistral_rerank import open_reranker
from mistral_rerank.evaluation.first_stage import BM25, fuse

PASSAGES = {
    "adenosine": "Caffeine keeps us awake because it blocks adenosine, the substance that makes us tired.",
    "sleep": "Adults sleep seven to nine hours a night, children longer.",
    "harvest": "Coffee is harvested by hand on steep slopes.",
    "tea": "Drinking green tea after a meal is common in Japan.",
    "decaf": "Decaffeinated beans are steamed before they are roasted.",
    "siesta": "In hot countries people sleep after lunch.",
    "snore": "Snoring often stops when people sleep on their side.",
}
QUERY = "Why does caffein stop me from sleeping?"


def vectors(passages: list[str], query: str) -> tuple[np.ndarray, np.ndarray]:
    """Embed texts by their groups of three to five characters: (passages, features) and (features,), of length 1."""
    model = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit(passages)
    return model.transform(passages).toarray(), model.transform([query]).toarray()[0]


def main() -> None:
    """Print the order of both searches, of their fusion, and of the reranker."""
    names = list(PASSAGES)
    (by_words,) = BM25(PASSAGES).search([QUERY], k=4)
    words = [name for name, _ in by_words]
    embedded, query = vectors(list(PASSAGES.values()), QUERY)
    characters = [names[index] for index in np.argsort(-(embedded @ query), kind="stable")[:4]]
    fused = [name for name, _ in fuse([words, characters])]
    with open_reranker("mini") as reranker:
        ranking = reranker.rank(QUERY, [PASSAGES[name] for name in fused], top_n=3)
    print(QUERY)
    print("  words:     ", ", ".join(words))
    print("  characters:", ", ".join(characters))
    print("  fused:     ", ", ".join(fused))
    print("  reranked:  ", ", ".join(f"{fused[place.index]} {place.score.probability:.2f}" for place in ranking))


if __name__ == "__main__":
    main()
