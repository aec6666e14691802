"""Who is read to the end, and what the others get: over random pairs, duplicates among them."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_rerank import Score
from mistral_rerank.local.engine.cascade import Cascade

PAIRS = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("123456789")), max_size=24)
LOGITS = st.floats(-9, 9)


def run(pairs, cascade_depth, estimates, exact):
    """Give the pairs that were scored, and the scores of all."""
    cascade = Cascade(pairs, cascade_depth)
    chosen = cascade.choose([Score.from_logit(estimates[pair]) for pair in cascade.over_depth])
    return chosen, cascade.complete([Score.from_logit(exact[pair]) for pair in chosen])


@given(st.data(), PAIRS, st.integers(1, 6))
def test_the_best_estimates_are_read_to_the_end_and_stay_in_front(data, pairs, cascade_depth):
    distinct = sorted(set(pairs))
    estimates = {pair: data.draw(LOGITS) for pair in distinct}
    exact = {pair: data.draw(LOGITS) for pair in distinct}
    chosen, scores = run(pairs, cascade_depth, estimates, exact)
    assert chosen == [pair for pair in pairs if pair in set(chosen)]
    assert Counter(q for q, _ in set(chosen)) == {
        q: min(n, cascade_depth) for q, n in Counter(q for q, _ in distinct).items()
    }
    for pair, score in zip(pairs, scores, strict=True):
        rivals = [other for other in chosen if other[0] == pair[0]]
        if pair in chosen:
            assert score.logit == exact[pair]
        else:
            assert all(estimates[pair] <= estimates[rival] for rival in rivals)
            lowest = min(exact[rival] for rival in rivals)
            assert score.logit < lowest
            assert score.logit == pytest.approx(min(estimates[pair], lowest), abs=1e-9)
    for question in "ab":
        places = [place for place, pair in enumerate(pairs) if pair[0] == question]
        ranked = list(dict.fromkeys(pairs[place] for place in sorted(places, key=lambda i: (-scores[i].logit, i))))
        first = [pair for pair in ranked if pair in chosen]
        assert ranked[: len(first)] == first
        assert sorted(ranked[len(first) :], key=lambda pair: -estimates[pair]) == ranked[len(first) :]


def test_up_to_the_depth_all_are():
    pairs = [("a", "1"), ("a", "2"), ("a", "1")]
    cascade = Cascade(pairs, 2)
    assert cascade.over_depth == []
    assert cascade.choose([]) == pairs


def test_questions_with_few_passages_are_left_alone():
    pairs = [("a", "1"), ("b", "1"), ("a", "2"), ("a", "3"), ("b", "2"), ("a", "3")]
    cascade = Cascade(pairs, 2)
    assert cascade.over_depth == [("a", "1"), ("a", "2"), ("a", "3")]


def test_a_score_that_is_held_down_has_the_probability_of_its_bound_and_its_own_tokens():
    cascade = Cascade([("a", "1"), ("a", "2")], 1)
    cascade.choose([Score.from_logit(5.0, tokens=7), Score.from_logit(4.0, tokens=8)])
    first, second = cascade.complete([Score.from_logit(-3.0, scale=2.0, tokens=7)])
    assert second.logit == math.nextafter(first.logit, -math.inf)
    assert (second.probability, second.tokens) == (first.probability, 8)
