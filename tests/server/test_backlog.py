"""The estimates of time that refusals are made of."""

import pytest

from mistral_rerank.server.backlog import Backlog
from mistral_rerank.server.prometheus import Metrics, ModelMetrics


def measured(**options) -> Backlog:
    """One whose model computes 1,000 tokens a second."""
    backlog = Backlog(**options)
    backlog.ran_batch(1000, 1.0)
    return backlog


def test_tokens_are_estimated_from_characters_up_to_the_limit_of_a_pair():
    pairs = [("q" * 4, "a" * 35), ("q", "a" * 100_000), ("q", "")]
    assert Backlog(2048).estimate(pairs) == 10 + 2048
    assert Backlog().estimate(pairs) == 10 + 8192


def test_work_counts_while_it_waits():
    backlog = measured()
    with backlog.holding(3000), backlog.holding(4500):
        assert (backlog.tokens, backlog.retry_after()) == (7500, 8)
    assert (backlog.tokens, backlog.retry_after()) == (0, 1)


def test_a_small_request_waits_only_for_its_turns():
    backlog = measured()
    with backlog.holding(50_000), backlog.holding(100):
        assert backlog.seconds_until_answer(1000) == pytest.approx(1.0 + 1.0 + 0.1)
        assert backlog.seconds_until_answer(50_000) == pytest.approx(50.0 + 50.0 + 0.1)


def test_nothing_is_known_from_short_batches_and_idle_servers_begin_anything():
    backlog = Backlog()
    backlog.ran_batch(10, 1.0)
    with backlog.holding(10**6):
        assert (backlog.seconds_until_answer(10**6), backlog.retry_after()) == (0.0, 1)
    assert measured().seconds_until_answer(10**9) == 0.0


def test_the_speed_follows_the_last_batches():
    backlog = measured()
    for _ in range(60):
        backlog.ran_batch(1000, 0.1)
    with backlog.holding(100_000):
        assert backlog.retry_after() == 11  # the slow first batch still counts a little


def test_tokens_from_the_passage_cache_count_as_speed():
    backlog = Backlog()
    server = Metrics()
    metrics = ModelMetrics(server, backlog)
    metrics.used_prefixes(3, 1, 900, 4096)
    metrics.ran_batch(4, 100, 1.0)
    with backlog.holding(2000):
        assert backlog.seconds_until_answer(1000) == pytest.approx(2.0)
    text = server.text().decode()
    for name, value in (("hits_total", 3), ("misses_total", 1), ("saved_tokens_total", 900), ("bytes", 4096)):
        assert f"mistral_rerank_passage_cache_{name} {float(value)}\n" in text
    metrics.ran_batch(4, 100, 1.0)
    assert backlog._computed < 2 * 1000
