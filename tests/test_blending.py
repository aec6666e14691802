"""Blending with the first stage, by value."""

import math

import pytest

from mistral_rerank import Score
from mistral_rerank.blending import blend, blended_order
from mistral_rerank.scores import BLANK_SCORE, Usage, order

LOGITS = [1.0, 3.0, 2.0, -4.0]
RETRIEVER = [0.2, 0.1, 0.9, 0.8]


def test_the_ends_of_the_scale_are_the_two_orders():
    assert blended_order(LOGITS, RETRIEVER, 0.0) == [1, 2, 0, 3]
    assert blended_order(LOGITS, RETRIEVER, 1.0) == [2, 3, 0, 1]


def test_scores_are_standardized_and_weighted():
    # z-scores of [0, 2] and of [10, 0] are -1, 1 and 1, -1
    assert blended_order([0.0, 2.0], [10.0, 0.0], 0.49) == [1, 0]
    assert blended_order([0.0, 2.0], [10.0, 0.0], 0.51) == [0, 1]
    assert blended_order([0.0, 200.0], [10.0, 0.0], 0.51) == [0, 1]  # whatever the scale


@pytest.mark.parametrize("missing", [None, math.nan])
def test_ranks_take_the_place_of_missing_scores(missing):
    assert blended_order(LOGITS, [None] * 4, 1.0) == [0, 1, 2, 3]
    assert blended_order(LOGITS, [0.2, missing, 0.9, 0.8], 1.0) == [0, 1, 2, 3]


def test_equal_scores_leave_the_order_to_the_other_stage_and_then_to_the_input():
    assert blended_order([1.0, 1.0, 1.0], [0.1, 0.3, 0.2], 0.5) == [1, 2, 0]
    assert blended_order([0.1, 0.3, 0.2], [1.0, 1.0, 1.0], 0.5) == [1, 2, 0]
    assert blended_order([1.0, 1.0], [1.0, 1.0], 0.5) == [0, 1]


def test_blank_passages_stay_last_and_do_not_move_the_scale():
    assert blended_order([0.0, BLANK_SCORE.logit, 2.0], [10.0, 99.0, 0.0], 0.49) == [2, 0, 1]


def test_a_blended_ranking_keeps_scores_and_usage():
    ranking = order(["a", "b", "c", "d"], [Score.from_logit(logit, tokens=5) for logit in LOGITS])
    ranking.usage = Usage(tokens=20)
    blended = blend(ranking, RETRIEVER, 1.0)
    assert [(ranked.index, ranked.text, ranked.score.logit) for ranked in blended] == [
        (2, "c", 2.0),
        (3, "d", -4.0),
        (0, "a", 1.0),
        (1, "b", 3.0),
    ]
    assert blended.usage == Usage(tokens=20)
    assert blend(order([], []), [], 0.5) == []
