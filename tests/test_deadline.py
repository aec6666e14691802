"""The deadline of a call: in the engine's queue, at an endpoint, and for rerankers of users."""

import asyncio
import threading

import pytest
from remote.endpoint import Endpoint, expected, hangs, speaks
from support import LengthReranker

from mistral_rerank import InvalidInputError, LocalReranker, RemoteError, RemoteReranker
from mistral_rerank.errors import DeadlineExceededError
from mistral_rerank.local.model.rerank_model import RerankModel
from mistral_rerank.remote.retries import Retries

BOTH_WAYS = pytest.mark.parametrize("way", ["sync", "async"])
SOON, LATER = 0.05, 60.0
PASSAGES = ["one", "two", "three"]


def rank(reranker, way, passages=PASSAGES, **options):
    if way == "sync":
        return reranker.rank("q", passages, **options)
    return asyncio.run(reranker.arank("q", passages, **options))


@pytest.fixture
def blocked(monkeypatch):
    """Stops every batch until the event is set, and counts the batches that began."""
    logits, batches, release = RerankModel.logits, [], threading.Event()

    def waits(self, batch, *arguments):
        batches.append(batch)
        assert release.wait(60)
        return logits(self, batch, *arguments)

    monkeypatch.setattr(RerankModel, "logits", waits)
    yield batches, release
    release.set()


@BOTH_WAYS
def test_a_local_call_waits_neither_for_its_batch_nor_for_those_of_others(way, tiny, blocked):
    batches, release = blocked
    with LocalReranker(str(tiny), device="cpu", dtype="float32") as reranker:
        for _ in range(3):  # the first one's batch begins; the others wait in the queue
            with pytest.raises(DeadlineExceededError, match=r"within 0\.05 s"):
                rank(reranker, way, deadline=SOON)
        assert not release.is_set()
        release.set()
        assert len(rank(reranker, way, deadline=LATER)) == 3
    assert len(batches) <= 2  # of the cancelled calls only one may have begun


@BOTH_WAYS
def test_a_local_call_does_not_wait_for_the_model_to_load(way, tiny, monkeypatch):
    loads, release = threading.Event(), threading.Event()

    class Slow(LocalReranker):
        pass

    with Slow(str(tiny), device="cpu", dtype="float32") as reranker:
        load = reranker._engine._stage._load

        def waits():
            loads.set()
            assert release.wait(60)
            return load()

        monkeypatch.setattr(reranker._engine._stage, "_load", waits)
        with pytest.raises(DeadlineExceededError):
            rank(reranker, way, deadline=SOON)
        assert loads.is_set()
        release.set()
        assert len(rank(reranker, way, deadline=LATER)) == 3


@BOTH_WAYS
def test_a_deadline_in_time_changes_no_score(way, tiny_reranker):
    assert rank(tiny_reranker, way, deadline=LATER) == tiny_reranker.rank("q", PASSAGES)


@BOTH_WAYS
def test_a_remote_call_ends_at_the_deadline_or_at_the_timeout_whichever_is_first(way):
    with Endpoint(hangs) as endpoint:
        for options, deadline in (({}, SOON), ({"timeout": SOON}, LATER)):
            with RemoteReranker("m", base_url=endpoint.url, protocol="nvidia", **options) as reranker:
                with pytest.raises(DeadlineExceededError, match="raise timeout or deadline") as raised:
                    rank(reranker, way, deadline=deadline)
            assert isinstance(raised.value, RemoteError)
            assert isinstance(raised.value, TimeoutError)


@BOTH_WAYS
def test_retries_end_with_the_deadline(way):
    def fails(exchange):
        exchange.respond(503, {"detail": "busy"})

    with Endpoint(fails) as endpoint:
        retries = Retries(most=10, first_wait=1000.0, longest_wait=1000.0)
        with RemoteReranker("m", base_url=endpoint.url, protocol="nvidia", retries=retries) as reranker:
            with pytest.raises(RemoteError, match="busy"):  # at once, since the deadline is before the next attempt
                rank(reranker, way, deadline=LATER)
    assert len(endpoint.requests) == 1


@BOTH_WAYS
def test_a_remote_call_in_time_is_ranked(way):
    with Endpoint(speaks("nvidia")) as endpoint, RemoteReranker("m", base_url=endpoint.url) as reranker:
        assert rank(reranker, way, deadline=LATER) == expected(PASSAGES)


class Stuck(LengthReranker):
    """A user's reranker that knows no deadline, nor any option but `overflow`."""

    def __init__(self):
        super().__init__()
        self.release = threading.Event()

    def score_pairs(self, pairs, *, overflow=None):
        assert self.release.wait(60)
        return super().score_pairs(pairs)

    async def ascore_pairs(self, pairs, *, overflow=None):
        return await asyncio.to_thread(self.score_pairs, pairs)


@pytest.mark.parametrize("way", ["sync"])
def test_a_users_reranker_needs_no_code_for_deadlines(way):
    reranker = Stuck()
    with pytest.raises(DeadlineExceededError):
        rank(reranker, way, deadline=SOON)
    reranker.release.set()
    assert [ranked.text for ranked in rank(reranker, way, deadline=LATER)] == ["three", "one", "two"]


async def test_a_users_asynchronous_scoring_is_cancelled_at_the_deadline():
    cancelled = []

    class Waits(LengthReranker):
        async def ascore_pairs(self, pairs, *, overflow=None):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(len(pairs))
                raise

    with pytest.raises(DeadlineExceededError):
        await Waits().arank("q", PASSAGES, deadline=SOON)
    assert cancelled == [3]


@BOTH_WAYS
def test_a_timeout_of_the_reranker_itself_stays_its_own_error(way):
    class Fails(LengthReranker):
        def score_pairs(self, pairs, *, overflow=None):
            raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own") as raised:
        rank(Fails(), way, deadline=LATER)
    assert not isinstance(raised.value, DeadlineExceededError)


@BOTH_WAYS
@pytest.mark.parametrize("deadline", [0, -1.0, float("nan")])
def test_a_deadline_is_a_positive_number_of_seconds(way, deadline, length_reranker):
    with pytest.raises(InvalidInputError, match="seconds above 0"):
        rank(length_reranker, way, deadline=deadline)
