"""Which pairs make a shard."""

import numpy as np
import pytest

pytest.importorskip("numpy")

from mistral_rerank.offline.sharding import BUCKETS, Sharding, bucket_of


def sharding_of(shared: list[str], shard_pairs: int) -> Sharding:
    return Sharding(np.bincount([bucket_of(text) for text in shared], minlength=BUCKETS), shard_pairs)


def test_pairs_with_one_text_meet_in_a_shard_and_shards_are_about_equal():
    shared = [f"passage {number % 500}" for number in range(5000)]
    sharding = sharding_of(shared, 100)
    shards = sharding.shards_of(shared, [f"question {number}" for number in range(5000)])
    assert (sharding.pairs, sharding.shards) == (5000, 50)
    assert len(set(zip(shared, shards, strict=True))) == 500
    sizes = np.bincount(shards)
    assert len(sizes) == 50
    assert 80 <= sizes.min() <= sizes.max() <= 120


def test_one_question_about_many_passages_is_spread_over_shards():
    passages = [f"passage {number}" for number in range(1000)]
    sharding = sharding_of(["question"] * 1000, 100)
    sizes = np.bincount(sharding.shards_of(["question"] * 1000, passages))
    assert len(sizes) == 10
    assert sizes.max() < 150


def test_equal_pairs_meet_although_their_question_is_spread():
    passages = [f"passage {number % 200}" for number in range(1000)]
    shards = sharding_of(["question"] * 1000, 100).shards_of(["question"] * 1000, passages)
    assert len(set(zip(passages, shards, strict=True))) == 200


def test_half_a_surrogate_pair_has_a_shard():
    assert sharding_of(["cut \ud83d"], 10).shards_of(["cut \ud83d"], ["q"]).tolist() == [0]
