"""How many tokens of each passage were read, and how many were left out."""

import itertools
import logging

import pytest

from mistral_rerank import LocalReranker
from mistral_rerank.local.engine import job

LONG = "The glacier moved slowly down the valley and carved the rock. "


@pytest.fixture
def opened(tiny):
    def make(**options):
        return LocalReranker(str(tiny), device="cpu", dtype="float32", **options)

    return make


def test_each_passage_says_what_was_read_and_left_out(opened):
    passages = ["short", LONG * 4, LONG * 9]
    with opened() as reranker:
        whole = reranker.score_pairs([("who?", passage) for passage in passages])
    assert [score.tokens_left_out for score in whole] == [0, 0, 0]
    with opened(max_length=60) as reranker:
        cut = {ranked.index: ranked.score for ranked in reranker.rank("who?", passages)}
    assert (cut[0].tokens, cut[0].tokens_left_out) == (whole[0].tokens, 0)
    for index in (1, 2):
        assert (cut[index].tokens, cut[index].tokens_left_out) == (60, whole[index].tokens - 60)


def test_chunks_leave_nothing_out(opened):
    with opened(max_length=60, overflow="chunk") as reranker:
        (score,) = reranker.score_pairs([("who?", LONG * 9)])
    assert score.tokens > 60 * 2
    assert score.tokens_left_out == 0


def test_the_count_of_a_very_long_passage_is_an_estimate(opened):
    with opened() as reranker:
        one, two = reranker.score_pairs([("who?", LONG), ("who?", LONG * 2)])
    with opened(max_length=100) as reranker:
        (score,) = reranker.score_pairs([("who?", LONG * 2000)])
    assert score.tokens == 100
    assert score.tokens_left_out == pytest.approx(2000 * (two.tokens - one.tokens), rel=0.05)


def test_a_cached_score_has_its_counts(opened):
    with opened(max_length=60, cache_size=8) as reranker:
        first, second = (reranker.score_pairs([("who?", LONG * 9)]) for _ in range(2))
    assert first[0].tokens_left_out == second[0].tokens_left_out > 0


def test_the_first_cut_of_a_process_is_a_warning_and_later_ones_are_information(opened, monkeypatch, caplog):
    monkeypatch.setattr(job, "_cut_calls", itertools.count())
    caplog.set_level(logging.INFO, logger="mistral_rerank")
    with opened(max_length=60) as reranker:
        for _ in range(2):
            reranker.score_pairs([("who?", "short"), ("who?", LONG * 9)])
    records = [record for record in caplog.records if "were cut" in record.message]
    assert [record.levelno for record in records] == [logging.WARNING, logging.INFO]
    assert "1 of 2 passages were over the limit and were cut" in records[0].message
    assert "glacier" not in caplog.text
