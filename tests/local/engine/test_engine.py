"""The worker and its queue, with a scorer of the test's own at the edge; and the real thing under concurrency."""

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import pairwise

import pytest

from mistral_rerank import CheckpointError, LocalReranker, RerankerClosedError, Score, ScoringError
from mistral_rerank.local.batching.planning import plan_padded
from mistral_rerank.local.engine import engine as module
from mistral_rerank.local.engine.batch_size import BatchSize
from mistral_rerank.local.engine.engine import Engine
from mistral_rerank.local.engine.tokenizer import EncodedPair
from mistral_rerank.reranker import Observer


class Lengths:
    """Scores a sequence by its length; holds `gate` closed to let a test fill the queue."""

    def __init__(self, *, memory: int = 10**9) -> None:
        self.memory = memory
        self.batches: list[list[int]] = []
        self.partial_states = 0
        self.tokenized: list[str] = []
        self.running, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    state_bytes = 1
    key_value_bytes = 0

    @property
    def model(self):
        return self

    @property
    def tokenizer(self):
        return self

    def slices(self, pairs, overflow=None, *, instruction=None, locate=False):
        self.tokenized += [passage for _, passage in pairs]
        if pairs[-1][1] == "open":
            self.gate.set()
            raise ValueError("the gate is open")
        yield self.encode(pairs, locate=locate)

    def encode(self, pairs, *, locate):
        if any(passage == "bad" for _, passage in pairs):
            raise ValueError("bad passage")
        sequences = [tuple([ord(c) for c in part] for part in passage.split("|")) for _, passage in pairs]
        return [EncodedPair(parts, tuple(range(len(part) if locate else 0) for part in parts)) for parts in sequences]

    def plan(self, sequences, budget):
        return plan_padded(sequences, budget)

    def logits(self, batch, partial_states=()):
        sequences = batch.sequences
        self.partial_states += len(partial_states)
        assert not partial_states or partial_states == ["".join(map(chr, ids)) for ids in sequences]
        self.running.set()
        self.gate.wait(10)
        self.batches.append([len(ids) for ids in sequences])
        if len(sequences) * max(map(len, sequences)) > self.memory:
            raise MemoryError("too big")
        return [float(len(ids)) for ids in sequences]

    def estimates(self, batch, passages):
        assert list(map(len, passages)) == list(map(len, batch.sequences))
        return [-logit for logit in self.logits(batch)], ["".join(map(chr, ids)) for ids in batch.sequences]

    def score(self, logit, *, tokens):
        return Score.from_logit(logit)


def engine(scorer, *, batch_tokens=12, share_batches=False):
    return Engine(lambda: scorer, batch_tokens=batch_tokens, share_batches=share_batches)


def submit(made, *passages):
    return made.submit([("q", passage) for passage in passages])


class FirstPass:
    """Estimates all pairs, and scores those of the highest estimates: here the shortest."""

    def __init__(self, pairs, most=1):
        self.over_depth, self.most, self.estimates = pairs, most, None

    def choose(self, estimates):
        self.estimates = [score.logit for score in estimates]
        order = sorted(range(len(estimates)), key=lambda place: -self.estimates[place])
        return [self.over_depth[place] for place in sorted(order[: self.most])]


def submit_two_passes(made, *passages, most=1):
    pairs = [("q", passage) for passage in passages]
    choice = FirstPass(pairs, most)
    return made.submit(pairs, choice=choice), choice


def let_go(made):
    """Open the gate once all jobs that came before are tokenized."""
    with pytest.raises(ValueError, match="gate"):
        submit(made, "open").result(timeout=10)


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
    assert scorer.running.wait(10)
    futures = [submit(made, *job) for job in jobs]
    let_go(made)
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


def test_estimates_have_batches_of_their_own_and_halve_them_like_others():
    scorer = Lengths(memory=10)
    made = engine(scorer, share_batches=True)
    scorer.gate.clear()
    first = submit(made, "b" * 10)
    assert scorer.running.wait(10)
    two, other, third = (
        submit_two_passes(made, "aaaa"),
        submit(made, "aaaa", "aaa"),
        submit_two_passes(made, "aa", "aaa"),
    )
    let_go(made)
    assert (logits(first), logits(two[0]), logits(other), logits(third[0])) == ([10], [4], [4, 3], [2])
    assert (two[1].estimates, third[1].estimates) == ([-4], [-2, -3])
    assert scorer.batches[1:5] == [[4, 3, 2], [4, 3], [2], [4, 3]]


def test_a_second_pass_goes_on_from_what_the_first_kept_as_far_as_there_is_room(monkeypatch):
    monkeypatch.setattr(module, "STATE_BYTES", 7)
    scorer = Lengths()
    future, choice = submit_two_passes(engine(scorer), "aaaa", "bb", "ccc", "bb", "d|aaaa", most=5)
    assert logits(future) == [4, 2, 3, 2, 4]
    assert choice.estimates == [-4, -2, -3, -2, -1]
    assert scorer.partial_states == 2  # of 4, 3, 2 and 1 tokens those that fit into 7 bytes
    assert sorted(length for batch in scorer.batches for length in batch) == [1, 1, 2, 2, 3, 3, 4, 4]


def test_what_is_kept_between_passes_is_bounded_over_all_calls(monkeypatch):
    monkeypatch.setattr(module, "STATE_BYTES", 20)
    held = []

    class Watching(Lengths):
        def logits(self, batch, partial_states=()):
            held.append(sum(len(ids) for job in made._jobs for ids in job.states))
            return super().logits(batch, partial_states)

    scorer = Watching()
    made = engine(scorer, batch_tokens=4)
    scorer.gate.clear()
    calls = [submit_two_passes(made, "aaaa", "bbb", "cc", most=2) for _ in range(16)]
    let_go(made)
    assert [logits(future) for future, _ in calls] == [[3, 2]] * 16
    assert 0 < max(held) <= 20
    assert scorer.partial_states == 32


def test_running_out_of_memory_frees_what_is_kept_before_it_halves_a_batch():
    class Tight(Lengths):
        def logits(self, batch, partial_states=()):
            self.memory = 6 if any(job.states for job in made._jobs) and not self.held else 10**9
            self.held = self.held or self.memory == 6
            return super().logits(batch, partial_states)

    scorer = Tight()
    scorer.held = False
    made = engine(scorer)
    future, _ = submit_two_passes(made, "aaaa", "bbb", "cc", most=3)
    assert logits(future) == [4, 3, 2]
    assert scorer.held
    assert scorer.batches == [[4, 3, 2]] * 3
    assert made._size.tokens == 12


def test_a_cancelled_call_frees_what_it_kept():
    scorer = Lengths()
    made = engine(scorer, batch_tokens=4)
    running = threading.Event()

    class Waiting(FirstPass):
        def choose(self, estimates):
            future.cancel()
            running.set()
            return super().choose(estimates)

    pairs = [("q", "aaaa"), ("q", "bbb")]
    choice = Waiting(pairs, 2)
    scorer.gate.clear()
    future = made.submit(pairs, choice=choice)
    scorer.gate.set()
    assert running.wait(10)
    assert logits(submit(made, "a")) == [1]
    assert not made._jobs
    assert scorer.partial_states == 0


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
    let_go(made)
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


def test_batches_grow_back_after_memory_was_short_for_a_while():
    scorer = Lengths(memory=6)
    made = engine(scorer)
    passages = ("abc", "def", "ghi", "jkl")
    submit(made, *passages).result(timeout=10)
    scorer.memory = 10**9
    for _ in range(8):
        submit(made, *passages).result(timeout=10)
    assert scorer.batches[-1] == [3, 3, 3, 3]


def test_where_memory_stays_short_larger_batches_are_tried_ever_less_often():
    size = BatchSize(1000)
    tries = []
    for step in range(3000):
        if size.tokens > 500:
            size.out_of_memory(500)
            tries.append(step)
        else:
            size.succeeded()
    assert [later - earlier for earlier, later in pairwise(tries)][:6] == [9, 17, 33, 65, 129, 257]


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
    assert len(loads) == 1


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
    threads, gone = list(reranker._engine._threads), weakref.ref(reranker)
    del reranker
    gc.collect()
    assert gone() is None
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_cancelled_calls_are_not_tokenized():
    scorer = Lengths()
    tokenizing, may_go_on = threading.Event(), threading.Event()

    class Slow(Lengths):
        def slices(self, pairs, overflow=None, *, instruction=None, locate=False):
            if pairs[0][1] == "slow":
                tokenizing.set()
                may_go_on.wait(10)
            return super().slices(pairs, overflow, locate=locate)

    scorer = Slow()
    made = engine(scorer)
    first = submit(made, "slow")
    assert tokenizing.wait(10)
    doomed = submit(made, "aaaa")
    assert doomed.cancel()
    may_go_on.set()
    assert logits(submit(made, "aa")) == [2]
    assert logits(first) == [4]
    assert scorer.tokenized == ["slow", "aa"]


def test_a_call_with_much_text_holds_up_no_batch_and_no_other_calls_tokens():
    class Slices(Lengths):
        def slices(self, pairs, overflow=None, *, instruction=None, locate=False):
            for pair in pairs:
                if pair[1] == "wait":
                    answered.wait(10)
                self.tokenized.append(pair[1])
                yield self.encode([pair], locate=locate)

    answered = threading.Event()
    scorer = Slices()
    made = engine(scorer)
    running = submit(made, *["aaaa"] * 3, "aaa")
    big = submit(made, "b", "b", "b", "wait", "b")
    small = submit(made, "cc")
    assert logits(small) == [2]
    assert logits(running) == [4, 4, 4, 3]
    assert not big.done()
    answered.set()
    assert logits(big) == [1, 1, 1, 4, 1]


async def test_aclose_does_not_block_the_loop_while_a_batch_or_a_load_runs(tiny, monkeypatch):
    loading, may_go_on = threading.Event(), threading.Event()

    def load(*_, **__):
        loading.set()
        may_go_on.wait(10)
        return Lengths()

    monkeypatch.setattr("mistral_rerank.local.reranker.LoadedCheckpoint", load)
    reranker = LocalReranker(str(tiny), device="cpu")
    call = asyncio.create_task(reranker.ascore_pairs([("q", "aa")]))
    await asyncio.to_thread(loading.wait, 10)
    closing = asyncio.create_task(reranker.aclose())
    for _ in range(10):
        await asyncio.sleep(0)  # the loop goes on
    assert not closing.done()
    may_go_on.set()
    await asyncio.wait_for(closing, 10)
    with pytest.raises(RerankerClosedError):
        await asyncio.wait_for(call, 10)
    await reranker.aclose()


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


def test_batches_of_different_adapters_are_never_joined():
    scorer, adapter = Lengths(), Lengths()
    scorer.adapters = {"a": adapter}
    scorer.gate.clear()
    made = engine(scorer, share_batches=True)
    first = submit(made, "a" * 12)
    scorer.running.wait(10)
    others = [submit(made, "aa"), made.submit([("q", "aaa")], adapter="a"), submit(made, "a")]
    let_go(made)
    assert [logits(future) for future in (first, *others)] == [[12], [2], [3], [1]]
    assert scorer.batches == [[12], [2, 1]]
    assert adapter.batches == [[3]]


def test_an_adapter_that_runs_out_of_memory_halves_its_batch():
    scorer, adapter = Lengths(), Lengths(memory=6)
    scorer.adapters = {"a": adapter}
    assert logits(engine(scorer).submit([("q", "aaaa"), ("q", "aaa")], adapter="a")) == [4, 3]
    assert scorer.batches == []
    assert adapter.batches == [[4, 3], [4], [3]]
