from mistral_rerank.evaluation.first_stage import BM25


def test_bm25_ranks_by_shared_words_and_leaves_out_passages_without_any(facts):
    corpus = {"d1": "the cat sat on the mat", "d2": "cats and cats", "d3": "dogs"}
    (ranking,) = BM25(corpus).search(["cat"], k=10)
    assert [passage for passage, _ in ranking] == ["d2", "d1"]
    assert ranking[0][1] > ranking[1][1] > 0


def test_it_gives_at_most_k(facts):
    rankings = BM25(facts.corpus).search(list(facts.queries.values()), k=3)
    assert len(rankings) == len(facts.queries)
    assert all(len(ranking) <= 3 for ranking in rankings)


def test_a_query_without_a_known_word_finds_nothing():
    assert BM25({"d1": "cat", "d2": "dog"}).search(["xyzzy", "the"], k=5) == [[], []]
