"""One worker thread that owns the model, and the queue in front of it.

Callers (threads, asyncio tasks, server requests) submit pairs and get a future. The worker loads the model on
the first job, so there is one load whoever comes first, and no lock around model or tokenizer. It takes one
batch at a time and goes round the waiting jobs, so that a small job does not wait for a big one to finish;
jobs that were cancelled are dropped before their next batch.

With `share_batches` a batch is filled up with sequences of other waiting jobs. That keeps an accelerator busy,
at the price that rounding depends on who else was waiting. Without it a job's batches
depend on the job alone, and its scores are the same to the last bit whatever else goes on.

The engine knows no checkpoint, tokenizer or device: it is given something that loads a `Scorer`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from mistral_rerank.errors import RerankerClosedError, ScoringError
from mistral_rerank.reranker import Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mistral_rerank.local.tokens import EncodedPair
    from mistral_rerank.reranker import Overflow, Pair, Score

BEGUN_TOKENS = 32768
"""Tokens of a call whose states are kept between an estimate and the score: 72 MiB in mini, 512 in a Mistral-7B."""


class Cost(Protocol):
    """What a batch computes; the sum of two is that of both in one batch."""

    @property
    def tokens(self) -> int:
        """How many tokens."""

    def __add__(self, other: Self, /) -> Self: ...


class Scorer(Protocol):
    """What the worker needs of a loaded model."""

    def encode(self, pairs: Sequence[Pair], overflow: Overflow | None, *, locate: bool) -> list[EncodedPair]:
        """Tokenize pairs, and `locate` their passages; `overflow` None for the model's own choice."""

    def plan(self, sequences: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
        """Put sequences into batches that compute at most `budget` tokens: lists of positions."""

    def cost(self, sequences: Sequence[Sequence[int]]) -> Cost:
        """Say what a batch of these sequences computes."""

    def logits(self, sequences: Sequence[Sequence[int]], begun: Sequence[Any]) -> list[float]:
        """Score one batch of sequences, going on from what is `begun` if any is; MemoryError when it does not fit."""

    def estimates(
        self, sequences: Sequence[Sequence[int]], passages: Sequence[range]
    ) -> tuple[list[float], list[Any]]:
        """Estimate the logits of one batch, likewise, and give what is begun of each sequence.

        `passages` says where in them the passages are.
        """

    def score(self, logit: float, tokens: int) -> Score:
        """Make a score of a logit and the tokens read for it; ScoringError when it is not finite."""


@dataclass(frozen=True, slots=True)
class _Item:
    """One sequence of one job, and the pairs that it belongs to: equal pairs are scored once."""

    job: _Job
    pairs: tuple[int, ...]
    ids: list[int]
    passage: range
    begun: Any = None


@dataclass(frozen=True, slots=True)
class _Batch:
    """Sequences that share a forward."""

    items: list[_Item]
    cost: Any  # of the scorer's own kind

    @property
    def kind(self) -> tuple[bool, bool]:
        """What is done with them: whether they are estimated, whether they are begun."""
        return self.items[0].job.estimate, self.items[0].begun is not None


@dataclass(frozen=True, slots=True)
class Estimates:
    """What comes of pairs that are estimated.

    Attributes:
        scores: one a pair, in input order.
        begun: of sequences of theirs what can be gone on from, as far as `BEGUN_TOKENS` reach.

    """

    scores: list[Score]
    begun: dict[tuple[int, ...], Any]


NO_ESTIMATES = Estimates([], {})


class _Job:
    """What one caller asked for. `waiting` holds its batches not scored yet."""

    def __init__(
        self, pairs: Sequence[Pair], overflow: Overflow | None, begun: dict[tuple[int, ...], Any], *, estimate: bool
    ) -> None:
        self.pairs, self.overflow, self.begun, self.estimate = pairs, overflow, begun, estimate
        self.future: Future[Any] = Future()
        self.waiting: deque[_Batch] = deque()
        self.logits: list[float] = []
        self.tokens: list[int] = []
        self.room = BEGUN_TOKENS
        self.came: float | None = time.perf_counter()

    def encode(self, scorer: Scorer, budget: int) -> None:
        encoded = scorer.encode(self.pairs, self.overflow, locate=self.estimate)
        owners: dict[tuple[int, ...], list[int]] = {}
        passages: dict[tuple[int, ...], range] = {}
        for position, pair in enumerate(encoded):
            for ids, passage in zip(map(tuple, pair.sequences), pair.passages, strict=True):
                owners.setdefault(ids, []).append(position)
                passages.setdefault(ids, passage)
        items = [
            _Item(self, tuple(pairs), list(ids), passages[ids], self.begun.pop(ids, None))
            for ids, pairs in owners.items()
        ]
        self.begun.clear()  # of those that were not chosen
        for some in ([item for item in items if (item.begun is None) == fresh] for fresh in (True, False)):
            self.waiting += _batches(scorer, some, budget) if some else []
        self.logits = [float("-inf")] * len(encoded)
        self.tokens = [sum(map(len, pair.sequences)) for pair in encoded]

    def record(self, item: _Item, logit: float) -> None:
        """Keep the best of a pair's chunks; a logit that is not a number stays one."""
        for pair in item.pairs:
            self.logits[pair] = logit if logit != logit else max(self.logits[pair], logit)

    def keep(self, item: _Item, begun: Any) -> None:
        """Keep what is begun, while there is room."""
        if self.room >= len(item.ids) and tuple(item.ids) not in self.begun:
            self.room -= len(item.ids)
            self.begun[tuple(item.ids)] = begun

    def resolve(self, scorer: Scorer) -> None:
        try:
            scores = [scorer.score(*pair) for pair in zip(self.logits, self.tokens, strict=True)]
        except BaseException as error:
            self.fail(error)
        else:
            if self.future.set_running_or_notify_cancel():
                self.future.set_result(Estimates(scores, self.begun) if self.estimate else scores)

    def fail(self, error: BaseException) -> None:
        self.waiting.clear()
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


def _batches(scorer: Scorer, items: list[_Item], budget: int) -> list[_Batch]:
    planned = [[items[i] for i in positions] for positions in scorer.plan([item.ids for item in items], budget)]
    return [_Batch(batch, scorer.cost([item.ids for item in batch])) for batch in planned]


class Engine:
    """Runs batches on one thread.

    Attributes:
        observer: is told of every call and batch.

    Args:
        load: makes the scorer; called on the worker, once, or again if it failed.
        batch_tokens: the most tokens that a batch computes.
        share_batches: whether sequences of several jobs may share a batch.

    """

    def __init__(self, load: Callable[[], Scorer], *, batch_tokens: int, share_batches: bool) -> None:
        self.observer = Observer()
        self._load = load
        self._scorer: Scorer | None = None
        self._batch_tokens = batch_tokens
        self._share = share_batches
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: deque[_Job] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(
        self,
        pairs: Sequence[Pair],
        overflow: Overflow | None = None,
        *,
        begun: dict[tuple[int, ...], Any] | None = None,
    ) -> Future[list[Score]]:
        """Queue pairs; the future gives one score a pair, in input order. Cancelling it frees its place.

        Args:
            pairs: questions with passages.
            overflow: as in `Scorer.encode`.
            begun: of `Estimates`, to go on from; it is emptied.

        Raises:
            RerankerClosedError: the engine was closed.

        """
        return self._put(_Job(pairs, overflow, begun or {}, estimate=False))

    def estimate(self, pairs: Sequence[Pair], overflow: Overflow | None = None) -> Future[Estimates]:
        """Queue pairs to be estimated; otherwise as `submit`."""
        return self._put(_Job(pairs, overflow, {}, estimate=True))

    def _put(self, job: _Job) -> Future[Any]:
        with self._lock:
            if self._closed:
                raise RerankerClosedError("the reranker is closed; open a new one")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mistral-rerank", daemon=True)
                self._thread.start()
            self._inbox.put(job)
        return job.future

    def close(self) -> None:
        """Fail what is still waiting, free the model, and wait for the batch that is running."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
            if thread is not None:
                self._inbox.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while self._take_in():
            scorer = self._ready()
            if scorer is not None and self._jobs:
                self._step(scorer)
        self._scorer = None
        for job in self._jobs:
            job.fail(RerankerClosedError("the reranker was closed before these pairs were scored"))
        self._jobs.clear()

    def _take_in(self) -> bool:
        """Move what has arrived into the list of jobs, waiting when there is none; False to stop."""
        while True:
            try:
                job = self._inbox.get(block=not self._jobs)
            except queue.Empty:
                return True
            if job is None:
                return False
            self._jobs.append(job)

    def _ready(self) -> Scorer | None:
        """Load the model if need be, and tokenize the jobs that have just arrived."""
        try:
            if self._scorer is None:
                self._scorer = self._load()
        except BaseException as error:
            self._fail_all(error)
            return None
        for job in [job for job in self._jobs if not job.logits]:
            try:
                begun = time.perf_counter()
                job.encode(self._scorer, self._batch_tokens)
                self.observer.tokenized(time.perf_counter() - begun)
            except BaseException as error:
                job.fail(error)
            if not job.waiting:
                self._jobs.remove(job)
                if not job.future.done():
                    job.resolve(self._scorer)
        return self._scorer

    def _step(self, scorer: Scorer) -> None:
        """Score one batch: the first job's next, and others' with it if batches are shared."""
        job = self._jobs[0]
        if job.future.cancelled():
            self._jobs.popleft()
            return
        try:
            batch = self._next_batch(scorer, job)
        except BaseException as error:
            self._fail(job, error)
            return
        self._score(scorer, batch)
        self._jobs.rotate(-1)
        for done in [job for job in self._jobs if not job.waiting]:
            self._jobs.remove(done)
            done.resolve(scorer)

    def _score(self, scorer: Scorer, batch: _Batch) -> None:
        """Score a batch; where several jobs share one that fails, each is tried alone and answers for itself."""
        jobs = list({id(item.job): item.job for item in batch.items}.values())
        begun = time.perf_counter()
        try:
            for job in jobs:
                if job.came is not None:
                    self.observer.started(begun - job.came)
                    job.came = None
            logits = self._logits(scorer, batch.items)
            self.observer.ran_batch(len(batch.items), batch.cost.tokens, time.perf_counter() - begun)
        except BaseException as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            for job in jobs:
                own = [item for item in batch.items if item.job is job]
                self._score(scorer, _Batch(own, scorer.cost([item.ids for item in own])))
            return
        for item, logit in zip(batch.items, logits, strict=True):
            item.job.record(item, logit)

    def _fail(self, job: _Job, error: BaseException) -> None:
        job.fail(error)
        self._jobs.remove(job)

    def _next_batch(self, scorer: Scorer, job: _Job) -> _Batch:
        batch = job.waiting.popleft()
        if len(batch.items) > 1 and batch.cost.tokens > self._batch_tokens:
            batch, *later = _batches(scorer, batch.items, self._batch_tokens)  # planned before memory ran short
            job.waiting.extendleft(reversed(later))
        if not self._share:
            return batch
        items, cost = list(batch.items), batch.cost
        for other in list(self._jobs)[1:]:
            while other.waiting and other.waiting[0].kind == batch.kind and not other.future.cancelled():
                together = cost + other.waiting[0].cost
                if together.tokens > self._batch_tokens:
                    break
                items += other.waiting.popleft().items
                cost = together
        return _Batch(items, cost)

    def _logits(self, scorer: Scorer, items: list[_Item]) -> list[float]:
        """Score a batch, in halves where memory is short; later batches then start at the smaller size."""
        sequences = [item.ids for item in items]
        try:
            if not items[0].job.estimate:
                return scorer.logits(sequences, [item.begun for item in items if item.begun is not None])
            estimates, begun = scorer.estimates(sequences, [item.passage for item in items])
            for item, own in zip(items, begun, strict=True):
                item.job.keep(item, own)
            return estimates
        except MemoryError as error:
            if len(sequences) == 1:
                raise ScoringError(
                    f"out of memory for a single pair of {len(sequences[0])} tokens; lower max_length, or use "
                    "a smaller dtype or another device"
                ) from error
        half = (len(sequences) + 1) // 2
        self._batch_tokens = max(1, min(self._batch_tokens, scorer.cost(sequences[:half]).tokens))
        return self._logits(scorer, items[:half]) + self._logits(scorer, items[half:])

    def _fail_all(self, error: BaseException) -> None:
        for job in self._jobs:
            job.fail(error)
        self._jobs.clear()
