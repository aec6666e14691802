"""Turns: equal shares of tokens, small calls first, and long sequences in chunks that others run between."""

import threading
from concurrent.futures import CancelledError

import pytest

from mistral_rerank import LocalReranker, Score, ScoringError
from mistral_rerank.local.batching.planning import plan_padded
from mistral_rerank.local.engine import engine as module
from mistral_rerank.local.engine.engine import Engine
from mistral_rerank.local.engine.tokenizer import EncodedPair


class Trace:
    """Scores a sequence by its length. A passage "a:3" has three tokens of the call `a`; `trace` is what ran."""

    state_bytes = key_value_bytes = 1

    def __init__(self):
        self.trace: list[str] = []
        self.freed = 0
        self.running, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.after_step = lambda: None

    @property
    def model(self):
        return self

    @property
    def tokenizer(self):
        return self

    def slices(self, pairs, overflow=None, **options):
        if pairs[0][1] == "open":
            self.gate.set()
            raise ValueError("the gate is open")
        parts = [passage.split(":") for _, passage in pairs]
        yield [EncodedPair(((ord(call),) * int(length),), (range(0),)) for call, length in parts]

    def plan(self, sequences, budget):
        return plan_padded(sequences, budget)

    def step(self, text):
        self.running.set()
        self.gate.wait(10)
        self.trace.append(text)
        self.after_step()

    def logits(self, batch, partial_states=()):
        self.step("+".join(f"{chr(ids[0])}{len(ids)}" for ids in batch.sequences))
        return [float(len(ids)) for ids in batch.sequences]

    def chunks(self, sequence, tokens):
        try:
            for start in range(0, len(sequence), tokens):
                self.step(f"{chr(sequence[0])}[{start}]")
                yield None if start + tokens < len(sequence) else float(len(sequence))
        finally:
            self.freed += 1

    def score(self, logit, *, tokens):
        return Score.from_logit(logit)


def run(scorer, *calls, batch_tokens=8, share=False):
    """Queue calls behind a first one; returns their logits."""
    engine = Engine(lambda: scorer, batch_tokens=batch_tokens, share_batches=share)
    scorer.gate.clear()
    first = engine.submit([("q", "z:1")])
    assert scorer.running.wait(10)
    futures = [engine.submit([("q", passage) for passage in call]) for call in calls]
    with pytest.raises(ValueError, match="gate"):
        engine.submit([("q", "open")]).result(timeout=10)
    first.result(timeout=10)
    logits = [[score.logit for score in future.result(timeout=10)] for future in futures]
    engine.close()
    return logits


def test_a_small_call_runs_before_the_next_turn_of_a_large_one():
    scorer = Trace()
    run(scorer, ["a:8", "a:7", "a:6"], ["b:2"], ["c:3"])
    assert scorer.trace == ["z1", "b2", "c3", "a8", "a7", "a6"]


def test_calls_get_equal_shares_of_the_tokens_whatever_their_batches():
    scorer = Trace()
    run(scorer, ["a:16", "a:15", "a:14"], [f"b:{length}" for length in (8, 7, 6, 5, 4, 3)], batch_tokens=16)
    assert scorer.trace == ["z1", "a16", "b8+b7", "b6+b5", "a15", "b4+b3", "a14"]


def test_a_large_call_gets_its_share_beside_small_ones_that_never_end():
    scorer = Trace()
    engine = Engine(lambda: scorer, batch_tokens=8, share_batches=False)
    small = []

    def submit_next():
        if len(small) < 40:
            small.append(engine.submit([("q", "s:4")]))

    scorer.after_step = submit_next
    scorer.gate.clear()
    large = engine.submit([("q", "a:8"), ("q", "a:7")])
    small += [engine.submit([("q", "s:4")]) for _ in range(2)]
    scorer.gate.set()
    large.result(timeout=10)
    for future in small:
        future.result(timeout=10)
    engine.close()
    assert scorer.trace.index("a7") < 20


def test_small_calls_run_between_the_chunks_of_a_long_sequence():
    scorer = Trace()
    logits = run(scorer, ["a:20"], ["b:2"], ["c:12"])
    assert logits == [[20], [2], [12]]
    assert scorer.trace[1] == "b2"
    assert scorer.trace[2:] == ["a[0]", "c[0]", "a[8]", "c[8]", "a[16]"]


def test_a_second_long_sequence_waits_until_its_keys_and_values_fit(monkeypatch):
    monkeypatch.setattr(module, "STATE_BYTES", 30)
    scorer = Trace()
    logits = run(scorer, ["a:20"], ["c:12"], ["d:9"])
    assert logits == [[20], [12], [9]]
    assert scorer.trace[1:] == ["a[0]", "d[0]", "a[8]", "d[8]", "a[16]", "c[0]", "c[8]"]


def test_one_long_sequence_runs_even_if_it_exceeds_the_memory_limit(monkeypatch):
    monkeypatch.setattr(module, "STATE_BYTES", 1)
    assert run(Trace(), ["a:20"], ["c:12"]) == [[20], [12]]


@pytest.mark.parametrize("call", [["a:40"], ["a:8", "a:7", "a:6", "a:5"]], ids=["chunks", "batches"])
def test_a_cancelled_call_stops_after_the_running_step(call):
    scorer = Trace()
    engine = Engine(lambda: scorer, batch_tokens=8, share_batches=False)
    ready = threading.Event()

    def cancel():
        ready.wait(10)
        if len(scorer.trace) == 2:
            future.cancel()

    scorer.after_step = cancel
    future = engine.submit([("q", passage) for passage in call])
    ready.set()
    with pytest.raises(CancelledError):
        future.result(timeout=10)
    assert engine.submit([("q", "b:2")]).result(timeout=10)[0].logit == 2
    assert len(scorer.trace) == 3
    assert scorer.freed == (len(call) == 1)
    engine.close()


def test_a_long_sequence_that_exceeds_memory_is_an_error_and_frees_its_keys():
    class Tight(Trace):
        def chunks(self, sequence, tokens):
            yield None
            raise MemoryError("too big")

    engine = Engine(Tight, batch_tokens=8, share_batches=False)
    with pytest.raises(ScoringError, match="single pair of 20 tokens"):
        engine.submit([("q", "a:20")]).result(timeout=10)
    assert engine.submit([("q", "b:2")]).result(timeout=10)[0].logit == 2
    engine.close()


def test_shared_batches_are_full_for_a_call_alone_and_cut_to_turns_beside_others(monkeypatch):
    monkeypatch.setattr(module, "SHARED_TURN", 8)
    alone, beside = Trace(), Trace()
    run(alone, ["a:7", "a:6", "a:5"], batch_tokens=64, share=True)
    run(beside, ["a:8", "a:7", "a:6"], ["b:3"], batch_tokens=64, share=True)
    assert alone.trace == ["z1", "a7+a6+a5"]
    assert beside.trace == ["z1", "a8+b3", "a7+a6"]


def test_scores_do_not_depend_on_other_calls_to_the_last_bit(tiny):
    long_passage = " ".join(f"word{n} and iron" for n in range(60))
    calls = [[("q", long_passage)], [("q", f"iron {n}") for n in range(30)], [("q", "lead"), ("q", long_passage[:300])]]
    with LocalReranker(str(tiny), device="cpu", dtype="float32", batch_tokens=64) as reranker:
        serial = [reranker.score_pairs(call) for call in calls]
        engine = reranker._engine
        together = [future.result(timeout=30) for future in [engine.submit(call) for call in calls * 3]]
    assert together == serial * 3
    with LocalReranker(str(tiny), device="cpu", dtype="float32") as whole:
        for call, scores in zip(calls, serial, strict=True):
            logits = [score.logit for score in whole.score_pairs(call)]
            assert [score.logit for score in scores] == pytest.approx(logits, abs=1e-4)
