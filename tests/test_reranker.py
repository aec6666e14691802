import json
import math

import pytest

from mistral_rerank import InvalidInputError, Score, ScoringError
from mistral_rerank.scores import order, sigmoid


def test_rank_puts_the_best_first_and_keeps_input_positions(length_reranker):
    ranking = length_reranker.rank("q", ["a", "ccc", "bb"])
    assert [(ranked.index, ranked.text) for ranked in ranking] == [(1, "ccc"), (2, "bb"), (0, "a")]


def test_equal_scores_keep_their_input_order(length_reranker):
    assert [ranked.index for ranked in length_reranker.rank("q", ["aa", "bb", "cc"])] == [0, 1, 2]


def test_duplicate_passages_keep_their_positions(length_reranker):
    assert [ranked.index for ranked in length_reranker.rank("q", ["a", "bb", "a"])] == [1, 0, 2]


@pytest.mark.parametrize(("top_n", "expected"), [(None, 3), (2, 2), (9, 3)])
def test_top_n_bounds_the_result(length_reranker, top_n, expected):
    assert len(length_reranker.rank("q", ["a", "b", "c"], top_n=top_n)) == expected


async def test_nothing_is_scored_when_the_result_is_empty_anyway(length_reranker):
    assert length_reranker.rank("q", []) == []
    assert length_reranker.rank("q", ["a"], top_n=0) == []
    assert await length_reranker.arank("q", []) == []
    assert length_reranker.calls == 0


def test_min_score_is_a_probability_applied_before_top_n():
    scores = [Score.from_logit(logit) for logit in (-1.0, 2.0, 0.5)]
    ranking = order(["a", "b", "c"], scores, min_score=0.6, top_n=2)
    assert [ranked.text for ranked in ranking] == ["b", "c"]
    assert order(["a", "b", "c"], scores, min_score=0.7, top_n=2)[0].text == "b"
    assert len(order(["a", "b", "c"], scores, min_score=0.7, top_n=2)) == 1


@pytest.mark.parametrize(
    ("query", "passages", "options", "hint"),
    [
        ("  ", ["a"], {}, "question is empty"),
        (None, ["a"], {}, "question is empty"),
        ("q", "a", {}, "list of strings"),
        ("q", ["a"], {"top_n": -1}, "0 or more"),
        ("q", ["a"], {"min_score": 1.5}, "0 to 1"),
    ],
)
async def test_arguments_that_make_no_sense_are_refused(length_reranker, query, passages, options, hint):
    with pytest.raises(InvalidInputError, match=hint):
        length_reranker.rank(query, passages, **options)
    with pytest.raises(ValueError, match=hint):
        await length_reranker.arank(query, passages, **options)


async def test_arank_is_rank(length_reranker):
    assert await length_reranker.arank("q", ["a", "bb"], top_n=1) == length_reranker.rank("q", ["a", "bb"], top_n=1)


@pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_an_error(logit):
    with pytest.raises(ScoringError, match="float32"):
        Score.from_logit(logit)


def test_calibration_moves_the_probability_and_not_the_logit():
    score = Score.from_logit(2.0, scale=0.5, bias=-1.0)
    assert (score.logit, score.probability) == (2.0, 0.5)


def test_sigmoid_holds_at_both_ends():
    assert (sigmoid(-1e4), sigmoid(0.0), sigmoid(1e4)) == (0.0, 0.5, 1.0)


async def test_no_blank_passage_outranks_text_or_is_scored(length_reranker):
    passages = ["", "a", " \n\u3000", "bb"]
    ranking = length_reranker.rank("q", passages)
    assert [ranked.index for ranked in ranking] == [3, 1, 0, 2]
    assert [ranked.score.probability for ranked in ranking[2:]] == [0.0, 0.0]
    assert json.loads(json.dumps(ranking[-1].score.logit)) == ranking[-1].score.logit == -1e4
    assert await length_reranker.arank("q", passages) == ranking
    assert [ranked.index for ranked in length_reranker.rank("q", passages, min_score=0.01)] == [3, 1]
    length_reranker.calls = 0
    assert len(length_reranker.rank("q", ["", " "])) == 2
    assert length_reranker.calls == 0


def test_a_model_gives_a_blank_passage_probability_0(tiny_reranker):
    scores = tiny_reranker.score_pairs([("q", ""), ("q", "a"), ("q", "\t")])
    assert [score.probability == 0.0 for score in scores] == [True, False, True]
    assert scores[1] == tiny_reranker.score_pairs([("q", "a")])[0]


async def test_passages_and_pairs_may_come_from_a_generator(length_reranker, tiny_reranker):
    expected = length_reranker.rank("q", ["a", "bb"])
    assert length_reranker.rank("q", (text for text in ["a", "bb"])) == expected
    assert await length_reranker.arank("q", (text for text in ["a", "bb"])) == expected
    pairs = [("q", "a"), ("q", "bb")]
    assert tiny_reranker.score_pairs(pair for pair in pairs) == tiny_reranker.score_pairs(pairs)
    assert await tiny_reranker.ascore_pairs([list(pair) for pair in pairs]) == tiny_reranker.score_pairs(pairs)


@pytest.mark.parametrize(
    ("query", "passages", "hint"),
    [
        (["a", "b"], "secret", "swapped"),
        (["secret"], ["a"], "must be a string, got a list"),
        ("q", None, "passages is a NoneType"),
        ("q", {"a": 1}, "passages is a dict"),
    ],
)
def test_swapped_and_foreign_arguments_are_named(length_reranker, query, passages, hint):
    with pytest.raises(InvalidInputError, match=hint) as caught:
        length_reranker.rank(query, passages)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("pairs", ["ab", ("qa", "pb"), [("q",)], [("q", 3)], {"q": "a"}, None])
def test_pairs_of_another_shape_are_refused(tiny_reranker, pairs):
    with pytest.raises(InvalidInputError):
        tiny_reranker.score_pairs(pairs)


def test_max_gap_is_a_distance_of_logits_from_the_best_applied_before_top_n():
    scores = [Score.from_logit(logit) for logit in (-1.0, 2.0, 0.5)]
    assert [ranked.text for ranked in order(["a", "b", "c"], scores, max_gap=1.5)] == ["b", "c"]
    assert [ranked.text for ranked in order(["a", "b", "c"], scores, max_gap=1.4)] == ["b"]
    assert [ranked.text for ranked in order(["a", "b", "c"], scores, max_gap=0)] == ["b"]
    assert [ranked.text for ranked in order(["a", "b", "c"], scores, max_gap=1.5, top_n=1)] == ["b"]
    assert order(["a", "b", "c"], scores, max_gap=1.5, min_score=0.9) == []
    assert order([], [], max_gap=1.5) == []


async def test_rank_applies_max_gap(length_reranker):
    for ranking in (
        length_reranker.rank("q", ["a", "ccc", "bb"], max_gap=1.0),
        await length_reranker.arank("q", ["a", "ccc", "bb"], max_gap=1.0),
    ):
        assert [ranked.text for ranked in ranking] == ["ccc", "bb"]
    with pytest.raises(InvalidInputError, match="difference of logits"):
        length_reranker.rank("q", ["a"], max_gap=-1)
