import numpy as np
import pytest

from mistral_rerank import InvalidInputError, SettingsError
from mistral_rerank.evaluation.datasets import BeirDataset
from mistral_rerank.evaluation.encoders import EndpointEncoder
from mistral_rerank.evaluation.first_stage import (
    BM25,
    BM25Stage,
    DenseStage,
    HybridStage,
    RunStage,
    fuse,
    open_first_stage,
)


def search(stage, dataset, k, queries=None):
    return stage.search(dataset, queries or list(dataset.queries), k=k, progress=lambda _done, _total: None)


class WordEncoder:
    """One dimension a known word; questions count double."""

    words = ("cat", "dog", "mat")

    def encode(self, texts, kind, *, progress):
        progress(len(texts))
        factor = 2.0 if kind == "query" else 1.0
        return np.array([[factor * (word in text) for word in self.words] for text in texts], dtype=np.float32)


@pytest.fixture
def pets():
    corpus = {"d1": "the cat sat on the mat", "d2": "cats and cats", "d3": "dogs", "d4": "a dog and a cat"}
    return BeirDataset("pets", corpus, {"q1": "cat mat", "q2": "dog"}, {"q1": {"d1": 1}, "q2": {"d4": 1}})


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


def test_dense_search_is_exact_and_equal_scores_keep_the_corpus_order(pets):
    done = []
    stage = DenseStage(WordEncoder())
    rankings = stage.search(pets, ["q2", "q1"], k=3, progress=lambda count, total: done.append((count, total)))
    assert rankings == [[("d3", 2.0), ("d4", 2.0), ("d1", 0.0)], [("d1", 4.0), ("d2", 2.0), ("d4", 2.0)]]
    assert done == [(2, 6), (6, 6)]


def test_fusion_by_value():
    fused = fuse([["a", "b", "c"], ["b", "d"]])
    assert fused == [
        ("b", 1 / 62 + 1 / 61),
        ("a", 1 / 61),
        ("d", 1 / 62),
        ("c", 1 / 63),
    ]


def test_equal_sums_go_by_the_best_rank_and_then_the_first_ranking():
    assert [passage for passage, _ in fuse([["b"], ["a"]])] == ["b", "a"]
    assert [passage for passage, _ in fuse([["a", "b"], ["b", "a"]])] == ["a", "b"]


def test_a_hybrid_fuses_both_rankings(pets):
    bm25, dense = BM25Stage(), DenseStage(WordEncoder())
    found = search(HybridStage([bm25, dense]), pets, 2)
    for query, ranking in zip(pets.queries, found, strict=True):
        both = [[p for p, _ in search(stage, pets, 100, [query])[0]] for stage in (bm25, dense)]
        assert ranking == fuse(both)[:2]


def test_runs_are_read_from_a_file_or_a_folder_of_them(pets, tmp_path):
    (tmp_path / "pets.trec").write_text("q1 Q0 d2 1 0.9 x\nq1 Q0 d1 2 0.5 x\nother Q0 d7 1 1 x\n")
    expected = [["d2"], []]
    for path in (tmp_path, tmp_path / "pets.trec"):
        found = search(RunStage(path), pets, 1)
        assert [[passage for passage, _ in ranking] for ranking in found] == expected
    assert isinstance(open_first_stage(str(tmp_path)), RunStage)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("q1 Q0 d9 1 1 x\n", "ranks passage 'd9', which the corpus of pets lacks"),
        ("q9 Q0 d1 1 1 x\n", "holds none of the queries of pets"),
    ],
)
def test_a_run_of_other_data_is_refused(pets, tmp_path, content, hint):
    (tmp_path / "pets.trec").write_text(content)
    with pytest.raises(InvalidInputError, match=hint):
        search(RunStage(tmp_path), pets, 5)


def test_a_set_without_a_run_is_named(pets, tmp_path):
    with pytest.raises(InvalidInputError, match=r"folder with pets\.trec"):
        search(RunStage(tmp_path), pets, 5)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("bm52", "give bm25, dense:MODEL"),
        ("dense:", "give bm25, dense:MODEL"),
        ("dense:e5-lagre", "one of: nv-embed-qa, .*e5-large"),
        ("dense:http://host/v1", "dense:NAME@URL"),
        ("dense:x@ftp://host", "base_url must be like"),
    ],
)
def test_an_unknown_first_stage_says_what_there_is(name, hint):
    with pytest.raises(SettingsError, match=hint):
        open_first_stage(name)


def test_a_preset_with_an_endpoint_is_asked_there():
    stage = open_first_stage("dense:nv-embed-qa")
    assert isinstance(stage._encoder, EndpointEncoder)
    assert stage._encoder._url == "https://ai.api.nvidia.com/v1/retrieval/nvidia/embeddings"
