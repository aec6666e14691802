"""The worker and its queue, with a scorer of the test's own at the edge; and the real thing under concurrency."""

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from mistral_rerank import CheckpointError, LocalReranker, RerankerClosedError, Score, ScoringError
from mistral_rerank.local import engine as module
from mistral_rerank.local.engine import Engine
from mistral_rerank.local.plan import PaddedCost, plan_batches
from mistral_rerank.local.tokens import EncodedPair
from mistral_rerank.reranker import Observer


class Lengths:
    """Scores a sequence by its length; holds `gate` closed to let a test fill the queue."""

    def __init__(self, *, memory: int = 10**9) -> None:
        self.memory = memory
        self.batches: list[list[int]] = []
        self.begun = 0
        self.tokenized: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    state_bytes = 1

    def slices(self, pairs, overflow=None, *, locate=False):
        for pair in pairs:
            self.tokenized.append(pair[1])
            yield self.encode([pair], locate=locate)

    def encode(self, pairs, *, locate):
        if any(passage == "bad" for _, passage in pairs):
            raise ValueError("bad passage")
        sequences = [tuple([ord(c) for c in part] for part in passage.split("|")) for _, passage in pairs]
        return [EncodedPair(parts, tuple(range(len(part) if locate else 0) for part in parts)) for parts in sequences]

    def plan(self, sequences, budget):
        return plan_batches([len(ids) for ids in sequences], budget)

    def cost(self, sequences):
        return PaddedCost(len(sequences), max(map(len, sequences)))

    def logits(self, sequences, begun=()):
        assert not begun or begun == ["".join(map(chr, ids)) for ids in sequences]
        self.begun += len(begun)
        self.gate.wait(10)
        self.batches.append([len(ids) for ids in sequences])
        if len(sequences) * max(map(len, sequences)) > self.memory:
            raise MemoryError("too big")
        return [float(len(ids)) for ids in sequences]

    def estimates(self, sequences, passages):
        assert list(map(len, passages)) == list(map(len, sequences))
        return [-logit for logit in self.logits(sequences)], ["".join(map(chr, ids)) for ids in sequences]

    def score(self, logit, tokens=0):
        return Score.from_logit(logit)


def engine(scorer, *, batch_tokens=12, share_batches=False):
    return Engine(lambda: scorer, batch_tokens=batch_tokens, share_batches=share_batches)


def submit(made, *passages):
    return made.submit([("q", passage) for passage in passages])


def logits(future):
    return [score.logit for score in future.result(timeout=10)]


def test_results_come_in_input_order_from_batches_within_the_budget():
    scorer = Lengths()
    assert logits(submit(engine(scorer), "aa", "aaaaaa", "a", "aaa")) == [2, 6, 1, 3]
    assert scorer.batches == [[6, 3], [2, 1]]


def test_the_best_chunk_counts():
    assert logits(submit(engine(Lengths()), "aa|aaaa|a", "aaa")) == [4, 3]


def test_equal_pairs_are_scored_once():
    scorer = Lengths()
    assert logits(submit(engine(scorer), "aa", "bbb", "aa", "bbb|aa")) == [2, 3, 2, 3]
    assert scorer.batches == [[3, 2]]


def queued(scorer, made, *jobs):
    """Queue jobs while the worker is held up by a first one, which fills a batch, then let it go on."""
    scorer.gate.clear()
    first = submit(made, "a" * 12)
    futures = [submit(made, *job) for job in jobs]
    scorer.gate.set()
    first.result(timeout=10)
    return futures


def test_jobs_that_wait_share_a_batch_where_that_is_wanted():
    scorer = Lengths()
    first, second, third = queued(scorer, engine(scorer, share_batches=True), ["aaaa"], ["aa"], ["aaaaa"])
    assert (logits(first), logits(second), logits(third)) == ([4], [2], [5])
    assert scorer.batches[1:] == [[4, 2], [5]]


def test_jobs_keep_batches_of_their_own_otherwise():
    scorer = Lengths()
    first, second = queued(scorer, engine(scorer), ["aaaa"], ["aa", "aaa"])
    assert (logits(first), logits(second)) == ([4], [2, 3])
    assert scorer.batches[1:] == [[4], [3, 2]]


WAITING = [("aaaa", True), ("aaaa", False), ("aa", True), ("aaa", False), ("aaa", True)]


def test_estimates_have_batches_of_their_own_and_halve_them_like_others():
    scorer = Lengths(memory=10)
    made = engine(scorer, share_batches=True)
    scorer.gate.clear()
    first = submit(made, "b" * 10)
    waiting = [(made.estimate if flag else made.submit)([("q", passage)]) for passage, flag in WAITING]
    scorer.gate.set()
    assert logits(first) == [10]
    found = [future.result(timeout=10) for future in waiting]
    assert [one.scores[0].logit for one in found[::2]] == [-4, -2, -3]
    assert [one[0].logit for one in found[1::2]] == [4, 3]
    assert scorer.batches[1:] == [[4, 2, 3], [4, 2], [3], [4, 3]]


def test_what_an_estimate_began_is_gone_on_from_as_far_as_there_is_room(monkeypatch):
    monkeypatch.setattr(module, "BEGUN_TOKENS", 7)
    scorer = Lengths()
    made = engine(scorer)
    pairs = [("q", passage) for passage in ("aaaa", "bb", "ccc", "bb", "d|aaaa")]
    found = made.estimate(pairs).result(timeout=10)
    assert [score.logit for score in found.scores] == [-4, -2, -3, -2, -1]
    assert sum(map(len, found.begun)) == 7
    begun = len(found.begun)
    scorer.batches.clear()
    assert logits(made.submit([*pairs, ("q", "eeee")], begun=found.begun)) == [4, 2, 3, 2, 4, 4]
    assert (scorer.begun, found.begun) == (begun, {})
    assert sorted(length for batch in scorer.batches for length in batch) == [1, 2, 3, 4, 4]


def test_a_small_job_does_not_wait_for_a_big_one():
    scorer = Lengths()
    big, small = queued(scorer, engine(scorer), ["aaaaaaaa"] * 20, ["aa"])
    small.result(timeout=10)
    big.result(timeout=10)
    assert scorer.batches.index([2]) < 4


def test_a_cancelled_job_leaves_the_queue():
    scorer = Lengths()
    scorer.gate.clear()
    made = engine(scorer)
    submit(made, "a")
    doomed, kept = submit(made, "aaaa", "aaaa"), submit(made, "aa")
    assert doomed.cancel()
    scorer.gate.set()
    assert logits(kept) == [2]
    assert [4] not in scorer.batches
    with pytest.raises(CancelledError):
        doomed.result(timeout=10)


def test_a_pair_that_does_not_fit_fails_its_own_job_and_no_other():
    scorer = Lengths(memory=14)
    made = engine(scorer, batch_tokens=40, share_batches=True)
    scorer.gate.clear()
    first = submit(made, "a" * 14)
    small, big = submit(made, "b" * 13), submit(made, "c" * 15)
    scorer.gate.set()
    assert (logits(first), logits(small)) == ([14], [13])
    with pytest.raises(ScoringError, match="single pair of 15 tokens"):
        big.result(timeout=10)


def test_an_observer_that_raises_fails_the_call_and_not_the_worker():
    class Broken(Observer):
        def ran_batch(self, sequences, tokens, seconds):
            raise ValueError("full disk")

    made = engine(Lengths())
    made.observer = Broken()
    with pytest.raises(ValueError, match="full disk"):
        submit(made, "aa").result(timeout=10)
    made.observer = Observer()
    assert logits(submit(made, "aa")) == [2]


def test_a_job_that_cannot_be_tokenized_fails_alone():
    scorer = Lengths()
    bad, good = queued(scorer, engine(scorer), ["aa", "bad"], ["aa"])
    assert logits(good) == [2]
    with pytest.raises(ValueError, match="bad passage"):
        bad.result(timeout=10)


def test_running_out_of_memory_halves_the_batch_and_retries_only_that():
    scorer = Lengths(memory=6)
    assert logits(submit(engine(scorer), *("abc", "def", "ghi", "jkl", "mno", "pqr"))) == [3.0] * 6
    assert scorer.batches == [[3, 3, 3, 3], [3, 3], [3, 3], [3, 3]]


def test_a_single_pair_that_does_not_fit_is_an_error():
    with pytest.raises(ScoringError, match="single pair of 7 tokens"):
        submit(engine(Lengths(memory=6)), "aaaaaaa", "a").result(timeout=10)


def test_the_model_is_loaded_once_however_many_come_first():
    loads = []

    def load():
        loads.append(threading.current_thread().name)
        return Lengths()

    made = Engine(load, batch_tokens=12, share_batches=False)
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(lambda n: logits(submit(made, "a" * n)), range(1, 21))) == [[n] for n in range(1, 21)]
    assert loads == ["mistral-rerank"]


def test_a_load_that_failed_is_tried_again():
    attempts = []

    def load():
        attempts.append(1)
        if len(attempts) == 1:
            raise CheckpointError("no network")
        return Lengths()

    made = Engine(load, batch_tokens=12, share_batches=False)
    with pytest.raises(CheckpointError):
        submit(made, "a").result(timeout=10)
    assert logits(submit(made, "a")) == [1]


def test_closing_fails_what_waits_and_refuses_what_comes():
    scorer = Lengths()
    made = engine(scorer)
    scorer.gate.clear()
    submit(made, "a")
    waiting = submit(made, "aa")
    closer = threading.Thread(target=made.close)
    closer.start()
    scorer.gate.set()
    closer.join(10)
    with pytest.raises(RerankerClosedError):
        waiting.result(timeout=10)
    with pytest.raises(RerankerClosedError):
        submit(made, "a")
    made.close()


def test_a_forgotten_reranker_frees_its_thread(tiny):
    reranker = LocalReranker(str(tiny), device="cpu")
    reranker.warmup()
    thread, gone = reranker._engine._thread, weakref.ref(reranker)
    del reranker
    gc.collect()
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()


async def test_threads_and_tasks_at_once_get_exactly_the_scores_of_serial_calls(tiny_reranker, pairs):
    calls = [pairs[start : start + 1 + start % 9] for start in range(116)]
    serial = [tiny_reranker.score_pairs(call) for call in calls]
    gaps, running = [], True

    async def heartbeat():
        while running:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - start)

    beat = asyncio.create_task(heartbeat())
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(16) as pool:
        threads = [loop.run_in_executor(pool, tiny_reranker.score_pairs, call) for call in calls[:16]]
        tasks = [tiny_reranker.ascore_pairs(call) for call in calls[16:]]
        together = await asyncio.gather(*threads, *tasks)
    running = False
    await beat
    assert together == serial
    assert len(gaps) > 1


async def test_cancelling_a_task_returns_at_once_and_later_calls_work(tiny_reranker, pairs):
    task = asyncio.create_task(tiny_reranker.ascore_pairs(pairs * 5))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(await tiny_reranker.ascore_pairs(pairs[:3])) == 3


def test_one_reranker_serves_several_event_loops(tiny_reranker, pairs):
    first = asyncio.run(tiny_reranker.ascore_pairs(pairs[:4]))
    assert asyncio.run(tiny_reranker.ascore_pairs(pairs[:4])) == first


def test_shared_batches_give_the_same_scores_up_to_rounding(tiny, tiny_reranker, pairs):
    calls = [pairs[start : start + 5] for start in range(0, 100, 5)]
    serial = [score.logit for call in calls for score in tiny_reranker.score_pairs(call)]
    with LocalReranker(str(tiny), device="cpu", dtype="float32", share_batches=True) as shared:
        with ThreadPoolExecutor(20) as pool:
            together = [score.logit for scores in pool.map(shared.score_pairs, calls) for score in scores]
    assert together == pytest.approx(serial, abs=1e-4)
