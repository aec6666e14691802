"""Two threads that own the model, and the queues in front of them.

Callers (threads, asyncio tasks, server requests) submit pairs and get a future. The tokenizer stage loads the model
with the first job and turns texts into tokens; the forward thread runs the batches. Each goes round its waiting
jobs, so a small job does not wait for a big one to finish; cancelled jobs are dropped before their next step.

With `share_batches` a batch is filled up with sequences of other waiting jobs. That keeps an accelerator busy,
at the price that rounding depends on who else was waiting. Without it a job's batches
depend on the job alone, and its scores are the same to the last bit whatever else goes on.

A call may take two passes: estimates, and scores of those that are chosen by them. What is kept in between is bounded
over all calls: a call whose states do not fit waits for others to end.

The engine knows no checkpoint, tokenizer or device: it is given something that loads a `Scorer`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from itertools import chain
from typing import TYPE_CHECKING

from mistral_rerank._forks import ForkLock, after_fork
from mistral_rerank.errors import RerankerClosedError, ScoringError
from mistral_rerank.local.engine.batch_size import BatchSize
from mistral_rerank.local.engine.job import Batch, Job, batches
from mistral_rerank.local.engine.tokenizer_stage import TokenizerStage
from mistral_rerank.reranker import Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mistral_rerank.errors import RerankError
    from mistral_rerank.local.engine.job import Choice, Item, Scorer
    from mistral_rerank.reranker import Overflow, Pair, Score

STATE_BYTES = 512 * 1024**2
"""What all calls together keep between estimates and scores: 230,000 tokens of mini, 32,768 of a Mistral-7B."""


class Engine:
    """Runs batches on one thread, and tokenizes on another.

    After a fork the child has the model, threads and queues of its own, and none of the parent's jobs.

    Attributes:
        observer: is told of every call and batch.

    Args:
        load: makes the scorer; called once, or again if it failed.
        batch_tokens: the most tokens that a batch computes.
        share_batches: whether sequences of several jobs may share a batch.
        in_child: an error for calls in a forked child, where the model does not work there; None where it does.

    """

    def __init__(
        self,
        load: Callable[[], Scorer],
        *,
        batch_tokens: int,
        share_batches: bool,
        in_child: RerankError | None = None,
    ) -> None:
        self.observer = Observer()
        self._size = BatchSize(batch_tokens)
        self._share = share_batches
        self._in_child = in_child
        self._refusal: RerankError | None = None
        self._stage = TokenizerStage(load, self._prepare)
        self._turn = ForkLock()
        self._make_queues()
        after_fork(self._start_anew)

    def _make_queues(self) -> None:
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: deque[Job] = deque()
        self._arrived: deque[Job] = deque()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._stopped: Future[None] = Future()
        self._stopped.set_running_or_notify_cancel()  # nobody may cancel it

    def _start_anew(self) -> None:
        """Leave the parent's jobs and threads to the parent."""
        self._stage.forget_jobs()
        self._make_queues()
        self._refusal = self._refusal or self._in_child

    def submit(
        self, pairs: Sequence[Pair], overflow: Overflow | None = None, *, choice: Choice | None = None
    ) -> Future[list[Score]]:
        """Queue pairs; the future gives one score a pair, in input order. Cancelling it frees its place.

        Args:
            pairs: questions with passages.
            overflow: as in `Scorer.slices`.
            choice: of a call in two passes; the future then gives the scores of the pairs that it chooses.

        Raises:
            RerankerClosedError: the engine was closed.

        """
        job = Job(pairs, overflow, choice)
        with self._lock:
            if self._refusal is not None:
                raise type(self._refusal)(*self._refusal.args)
            if not self._threads:
                self._threads = [
                    threading.Thread(target=self._tokenize, name="mistral-rerank-tokenizer", daemon=True),
                    threading.Thread(target=self._run, name="mistral-rerank", daemon=True),
                ]
                for thread in self._threads:
                    thread.start()
            self._stage.put(job)
        return job.future

    def stop(self) -> Future[None]:
        """Fail what is waiting and free the model; the future is done when what is running has ended."""
        with self._lock:
            is_first = self._refusal is None
            self._refusal = RerankerClosedError("the reranker is closed; open a new one")
            if not self._threads:
                if not self._stopped.done():
                    self._stopped.set_result(None)
            elif is_first:
                self._stage.put(None)
        return self._stopped

    def close(self) -> None:
        """`stop`, and wait until it is done."""
        stopped = self.stop()
        if threading.current_thread() not in self._threads:
            stopped.result()
            for thread in self._threads:
                thread.join()

    def _tokenize(self) -> None:
        self._stage.run(_closed_too_early)
        self._inbox.put(None)

    def _prepare(self, job: Job, scorer: Scorer) -> None:
        job.plan(scorer, self._size.tokens)
        self.observer.tokenized(job.tokenizing)
        self._inbox.put(job)

    def _run(self) -> None:
        while self._take_in():
            with self._turn:
                self._admit()
                if self._jobs and self._stage.scorer is not None:
                    self._step(self._stage.scorer)
        self._stage.scorer = None
        for job in chain(self._jobs, self._arrived):
            job.fail(_closed_too_early())
        self._jobs.clear()
        self._arrived.clear()
        self._stopped.set_result(None)

    def _take_in(self) -> bool:
        """Move what has arrived into the lists of jobs, waiting when there is none; False to stop."""
        while True:
            is_idle = not self._jobs and not self._arrived
            try:
                job = self._inbox.get(block=is_idle or self._refusal is not None)
            except queue.Empty:
                return True
            if job is None:
                return False
            (self._arrived if job.estimating else self._jobs).append(job)

    def _admit(self) -> None:
        """Let calls in two passes begin, in the order in which they came, while there is room for their states."""
        while self._arrived:
            job = self._arrived[0]
            if not job.future.cancelled():
                granted = min(job.need, STATE_BYTES)
                if granted + sum(other.granted for other in self._jobs) > STATE_BYTES:
                    return
                job.grant(granted)
                self._jobs.append(job)
            self._arrived.popleft()

    def _step(self, scorer: Scorer) -> None:
        """Score one batch: the first job's next, and others' with it if batches are shared."""
        for job in [job for job in self._jobs if job.future.cancelled()]:
            self._fail(job, _closed_too_early())
        self._advance(scorer)
        if not self._jobs:
            return
        job = self._jobs[0]
        try:
            batch = self._next_batch(scorer, job)
        except BaseException as error:
            self._fail(job, error)
            return
        self._score(scorer, batch)
        self._jobs.rotate(-1)
        self._advance(scorer)

    def _advance(self, scorer: Scorer) -> None:
        """Begin the second pass of jobs, or resolve those that are done."""
        for job in [job for job in self._jobs if not job.waiting]:
            if job.advance(scorer, self._size.tokens):
                self._jobs.remove(job)

    def _score(self, scorer: Scorer, batch: Batch) -> None:
        """Score a batch; where several jobs share one that fails, each is tried alone and answers for itself."""
        jobs = list({id(item.job): item.job for item in batch.items}.values())
        partial_states = time.perf_counter()
        try:
            for job in jobs:
                if job.came is not None:
                    self.observer.started(partial_states - job.came)
                    job.came = None
            logits = self._logits(scorer, batch.items, goes_on=batch.goes_on)
            self._size.ran_well()
            self.observer.ran_batch(len(batch.items), batch.cost.tokens, time.perf_counter() - partial_states)
        except BaseException as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            for job in jobs:
                own = [item for item in batch.items if item.job is job]
                self._score(scorer, Batch(own, scorer.cost([item.ids for item in own]), batch.goes_on))
            return
        for item, logit in zip(batch.items, logits, strict=True):
            item.job.record(item, logit)

    def _fail(self, job: Job, error: BaseException) -> None:
        job.fail(error)
        self._jobs.remove(job)

    def _next_batch(self, scorer: Scorer, job: Job) -> Batch:
        batch = job.waiting.popleft()
        budget = self._size.tokens
        if len(batch.items) > 1 and batch.cost.tokens > budget:  # planned before memory ran short
            batch, *later = batches(scorer, batch.items, budget, goes_on=batch.goes_on)
            job.waiting.extendleft(reversed(later))
        if not self._share:
            return batch
        items, cost = list(batch.items), batch.cost
        for other in list(self._jobs)[1:]:
            while other.waiting and other.waiting[0].kind == batch.kind and not other.future.cancelled():
                together = cost + other.waiting[0].cost
                if together.tokens > budget:
                    break
                items += other.waiting.popleft().items
                cost = together
        return Batch(items, cost, batch.goes_on)

    def _logits(self, scorer: Scorer, items: list[Item], *, goes_on: bool) -> list[float]:
        """Score a batch. Where memory is short, states that are kept are freed, and then the batch is halved."""
        sequences = [item.ids for item in items]
        try:
            if not items[0].job.estimating:
                partial_states = [item.job.states.get(item.ids) for item in items] if goes_on else []
                return scorer.logits(sequences, [] if None in partial_states else partial_states)
            estimates, partial_states = scorer.estimates(sequences, [item.passage for item in items])
            for item, own in zip(items, partial_states, strict=True):
                item.job.keep(item, own)
            return estimates
        except MemoryError as error:
            has_freed = self._free_states()
            if len(sequences) == 1 and not has_freed:
                raise ScoringError(
                    f"out of memory for a single pair of {len(sequences[0])} tokens; lower max_length, or use "
                    "a smaller dtype or another device"
                ) from error
        if has_freed:
            return self._logits(scorer, items, goes_on=False)
        half = (len(sequences) + 1) // 2
        self._size.ran_short(scorer.cost(sequences[:half]).tokens)
        return [logit for part in (items[:half], items[half:]) for logit in self._logits(scorer, part, goes_on=goes_on)]

    def _free_states(self) -> bool:
        """Free what calls keep for their second pass, which is then computed again; whether there was any."""
        holding = [job for job in self._jobs if job.states]
        for job in holding:
            job.drop_states()
        return bool(holding)


def _closed_too_early() -> RerankError:
    return RerankerClosedError("the reranker was closed before these pairs were scored")
