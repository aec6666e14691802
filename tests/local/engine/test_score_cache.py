import asyncio
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from mistral_rerank import LocalReranker, RerankerClosedError, SettingsError, open_reranker
from mistral_rerank.reranker import Observer


class Batches(Observer):
    """Counts the batches that went through the model."""

    def __init__(self):
        self.count = 0

    def ran_batch(self, *_):
        self.count += 1


@pytest.fixture
def cached(tiny):
    with LocalReranker(str(tiny), device="cpu", dtype="float32", cache_size=100) as reranker:
        yield reranker


@pytest.fixture
def batches(cached):
    counter = Batches()
    cached.observe(counter)
    return counter


def test_known_pairs_are_not_scored_again(cached, batches, tiny_reranker, pairs):
    some = pairs[:20]
    first = cached.score_pairs(some)
    assert [score.logit for score in first] == pytest.approx(
        [score.logit for score in tiny_reranker.score_pairs(some)], abs=1e-4
    )
    count = batches.count
    assert cached.score_pairs(some) == first
    assert asyncio.run(cached.ascore_pairs(some[::-1])) == first[::-1]
    assert batches.count == count
    mixed = cached.score_pairs([some[3], ("a new question", "a new passage"), some[1]])
    assert (mixed[0], mixed[2]) == (first[3], first[1])
    assert batches.count == count + 1


def test_what_overflows_otherwise_is_another_score(cached, tiny):
    long = ("who?", "me you they " * 400)
    cached = LocalReranker(str(tiny), device="cpu", dtype="float32", cache_size=9, max_length=64)
    whole, pieces = (cached.score_pairs([long], overflow=how)[0] for how in ("truncate", "chunk"))
    assert whole.tokens < pieces.tokens
    assert cached.score_pairs([long], overflow="truncate") == [whole]
    cached.close()


def test_where_question_ends_and_passage_begins_matters(cached):
    one, other = cached.score_pairs([("who ate", " it"), ("who ate ", "it")])
    assert one.logit != other.logit
    assert cached.score_pairs([("who ate ", "it"), ("who ate", " it")]) == [other, one]


def test_the_least_recently_used_go_first(tiny):
    with LocalReranker(str(tiny), device="cpu", dtype="float32", cache_size=2) as reranker:
        counter = Batches()
        reranker.observe(counter)
        a, b, c = [("q", text) for text in "abc"]
        for pair, forwards in ((a, 1), (b, 2), (a, 2), (c, 3), (a, 3), (b, 4)):
            reranker.score_pairs([pair])
            assert counter.count == forwards


def test_a_call_of_more_pairs_than_are_kept_gets_all_its_scores(tiny, pairs):
    with LocalReranker(str(tiny), device="cpu", dtype="float32", cache_size=3) as reranker:
        assert len(reranker.score_pairs(pairs[:30])) == 30
        assert len(reranker._cache._scores) == 3


def test_threads_share_it(cached, pairs):
    expected = cached.score_pairs(pairs[:40])
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(cached.score_pairs, [pairs[:40]] * 32):
            assert found == expected


def test_a_closed_reranker_answers_nothing(cached):
    cached.score_pairs([("q", "a")])
    cached.close()
    with pytest.raises(RerankerClosedError):
        cached.score_pairs([("q", "a")])


def test_it_is_a_setting_and_no_text_or_score_is_pickled(cached):
    cached.score_pairs([("q", "secret passage")])
    data = pickle.dumps(cached)
    assert b"secret" not in data
    assert pickle.loads(data)._options["cache_size"] == 100
    assert open_reranker(cache_size=5)._options["cache_size"] == 5
    with pytest.raises(SettingsError, match="cache_size"):
        open_reranker(cache_size=-1)
