"""Maximal marginal relevance, by value."""

import pytest

from mistral_rerank import Score
from mistral_rerank.diversity import diversify
from mistral_rerank.scores import Ranking, Usage, order

PASSAGES = ["the glacier moved slowly", "the glacier moved slowly again", "a river in the valley", "sun"]
SCORES = [Score(3.0, 0.95), Score(2.0, 0.9), Score(1.0, 0.7), Score(-3.0, 0.05)]


@pytest.fixture
def ranking():
    ranking = order(PASSAGES, SCORES)
    ranking.usage = Usage(tokens=9)
    return ranking


def places(ranking):
    return [ranked.index for ranked in ranking]


def test_a_passage_that_repeats_an_earlier_one_falls_back(ranking):
    # common words: 4 of 5 between 0 and 1, 1 of 8 between 0 and 2
    diversified = diversify(ranking, 0.3)
    assert places(diversified) == [0, 2, 1, 3]
    assert [ranked.score for ranked in diversified] == [SCORES[index] for index in (0, 2, 1, 3)]
    assert diversified.usage == Usage(tokens=9)
    assert places(diversify(ranking, 0.3, top_n=2)) == [0, 2]


def test_the_ends_of_the_scale(ranking):
    assert places(diversify(ranking, 0.0)) == [0, 1, 2, 3]
    assert places(diversify(ranking, 1.0)) == [0, 3, 2, 1]
    assert diversify(Ranking(), 0.5) == []
    assert diversify(ranking, 0.5, top_n=0) == []


def test_embeddings_are_compared_where_all_passages_have_one(ranking):
    embeddings = [[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]
    assert places(diversify(ranking, 0.5, embeddings=embeddings)) == [0, 1, 3, 2]
    assert places(diversify(ranking, 0.3, embeddings=[None, *embeddings[1:]])) == [0, 2, 1, 3]  # by words


def test_another_order_keeps_its_first_passage(ranking):
    turned = Ranking(reversed(ranking))
    assert places(diversify(turned, 0.0)) == [3, 2, 1, 0]
    assert places(diversify(turned, 0.1))[0] == 3
