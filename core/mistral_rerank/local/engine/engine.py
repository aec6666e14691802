"""The engine: a tokenizer thread and a forward thread, and the queues in front of them.

Callers (threads, asyncio tasks, server requests) submit pairs and get a future. The tokenizer stage loads the model
with the first job and tokenizes; the forward thread runs batches. Waiting jobs take turns that are fair by tokens
(`turns`), so a small job does not wait for a large one. Cancelled jobs are dropped before their next step.

A turn is one batch. A sequence longer than a turn is computed in chunks, one a turn, and its keys and values are kept
between them. Some models compute a sequence whole (`RerankModel.key_value_bytes`), and so do the passes of a cascade
that return partial hidden states or resume from them.

With `share_batches` a batch is filled up with sequences of other jobs, and batches are cut to turns while other jobs
wait. That keeps an accelerator busy, but rounding then depends on the other jobs. Without it a turn is a whole batch:
a job's batches depend on the job alone, and its scores are reproducible to the last bit.

A call with a cascade takes two passes. The partial hidden states between them, and the keys and values of long
sequences, have one memory limit for all calls: what does not fit waits until others are done. One long sequence may
always run. The prefix cache has a limit of its own, and is cleared first if memory runs out.

The engine knows no checkpoint, tokenizer or device. It is given a function that loads a `Scorer`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from itertools import chain
from typing import TYPE_CHECKING

from mistral_rerank._forks import ForkLock, after_fork
from mistral_rerank.errors import RerankerClosedError, ScoringError
from mistral_rerank.local.batching.planning import joined_tokens
from mistral_rerank.local.engine.batch_size import BatchSize
from mistral_rerank.local.engine.job import Job, join_batches, plan_batches
from mistral_rerank.local.engine.tokenizer_stage import TokenizerStage
from mistral_rerank.local.engine.turns import Turns
from mistral_rerank.reranker import Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mistral_rerank.errors import RerankError
    from mistral_rerank.local.engine.job import Choice, Item, Model, QueuedBatch, Scorer
    from mistral_rerank.local.engine.prefix_cache import PrefixCache
    from mistral_rerank.local.engine.tokenizer import Cut
    from mistral_rerank.reranker import Overflow
    from mistral_rerank.scores import Pair, Score

logger = logging.getLogger(__name__)

STATE_BYTES = 512 * 1024**2
"""The memory for partial hidden states (230,000 tokens of mini, 32,768 of a Mistral-7B), and for the keys and values of
long sequences (21,000 tokens of mini)."""

SHARED_TURN = 2048
"""With shared batches, the most tokens of a job's turn while others wait."""


class Engine:
    """Runs batches on one thread, and tokenizes on another.

    A forked child keeps the model, starts its own threads and queues, and has none of the parent's jobs.

    Attributes:
        observer: receives the events of calls and batches.

    Args:
        load: loads the scorer; called again if it failed.
        batch_tokens: the most tokens that a batch computes.
        share_batches: whether sequences of several jobs may share a batch.
        in_child: the error of calls in a forked child, if the model does not work there; None if it does.
        prefixes: the prefix cache; None for none.

    """

    def __init__(
        self,
        load: Callable[[], Scorer],
        *,
        batch_tokens: int,
        share_batches: bool,
        in_child: RerankError | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.observer = Observer()
        self._prefixes = prefixes
        self._size = BatchSize(batch_tokens, SHARED_TURN if share_batches else None)
        self._share = share_batches
        self._in_child = in_child
        self._refusal: RerankError | None = None
        self._stage = TokenizerStage(load, self._prepare)
        self._fork_lock = ForkLock()
        self._make_queues()
        after_fork(self._reset_after_fork)

    def _make_queues(self) -> None:
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: deque[Job] = deque()
        self._pending: deque[Job] = deque()
        self._turns = Turns()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._stopped: Future[None] = Future()
        self._stopped.set_running_or_notify_cancel()  # so that it cannot be cancelled

    def _reset_after_fork(self) -> None:
        """Drop the parent's jobs and threads."""
        self._stage.forget_jobs()
        self._make_queues()
        self._refusal = self._refusal or self._in_child

    @property
    def caches_prefixes(self) -> bool:
        """Whether the loaded model works with the prefix cache."""
        scorer = self._stage.scorer
        return self._prefixes is not None and scorer is not None and scorer.model.prefix_bytes > 0

    def submit(
        self,
        pairs: Sequence[Pair],
        overflow: Overflow | Cut | None = None,
        *,
        instruction: str | None = None,
        choice: Choice | None = None,
        adapter: str | None = None,
    ) -> Future[list[Score]]:
        """Queue pairs; the future's result is one score for each, in input order. Cancelling it drops the job.

        Args:
            pairs: questions with passages.
            overflow: as in `PairTokenizer.slices`.
            instruction: likewise.
            choice: of a call with a cascade; the result is then the scores of the pairs that it chooses.
            adapter: one of the scorer's; None for the model itself.

        Raises:
            RerankerClosedError: the engine was closed.

        """
        job = Job(pairs, overflow, instruction, choice, adapter, self._prefixes)
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
        """Fail waiting jobs and free the model; the future is done when the running batch has ended."""
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
        """Stop, and wait until it is done."""
        stopped = self.stop()
        if threading.current_thread() not in self._threads:
            stopped.result()
            for thread in self._threads:
                thread.join()

    def _tokenize(self) -> None:
        self._stage.run(_closed_error)
        self._inbox.put(None)

    def _prepare(self, job: Job, scorer: Scorer) -> None:
        job.plan(scorer, self._size)
        self.observer.tokenized(job.tokenizing)
        self._inbox.put(job)

    def _run(self) -> None:
        while self._receive():
            with self._fork_lock:
                if self._pending:
                    self._admit()
                if self._jobs and self._stage.scorer is not None:
                    self._step(self._stage.scorer)
        self._stage.scorer = None
        if self._prefixes is not None:
            logger.info("passage cache: %s", self._prefixes.info())
            self._prefixes.clear()
            self._prefixes.prepared = {}
        for job in chain(self._jobs, self._pending):
            job.fail(_closed_error())
        self._jobs.clear()
        self._pending.clear()
        self._stopped.set_result(None)

    def _receive(self) -> bool:
        """Move queued jobs to the lists of jobs, waiting if these are empty; False to stop."""
        while True:
            is_idle = not self._jobs and not self._pending
            try:
                job = self._inbox.get(block=is_idle or self._refusal is not None)
            except queue.Empty:
                return True
            if job is None:
                return False
            if job.estimating:
                self._pending.append(job)
            else:
                self._start(job)

    def _start(self, job: Job) -> None:
        self._turns.enter(job)
        self._jobs.append(job)

    def _admit(self) -> None:
        """Start jobs with a cascade, in order of arrival, while there is memory for their partial hidden states."""
        while self._pending:
            job = self._pending[0]
            if not job.future.cancelled():
                granted = min(job.need, STATE_BYTES)
                if granted + self._held_bytes() > STATE_BYTES:
                    return
                job.grant(granted)
                self._start(job)
            self._pending.popleft()

    def _held_bytes(self) -> int:
        return sum(job.granted + job.chunk_bytes for job in self._jobs)

    def _step(self, scorer: Scorer) -> None:
        """Run one turn: the next batch of a job, together with others' if batches are shared."""
        for job in [job for job in self._jobs if job.future.cancelled()]:
            self._fail(job, _closed_error())
        if ready := [job for job in self._jobs if job.waiting and self._has_memory(scorer, job)]:
            turn = self._size.turn
            job = self._turns.order(ready, turn)[0]
            try:
                queued = self._next_batch(scorer, job, turn)
            except BaseException as error:
                self._fail(job, error)
                return
            self._score(scorer, queued, turn)
        for job in [job for job in self._jobs if not job.waiting]:
            if job.advance(scorer, self._size):
                self._jobs.remove(job)

    def _has_memory(self, scorer: Scorer, job: Job) -> bool:
        """Tell whether a job can take its turn: a long sequence waits for memory if another one has begun."""
        head = job.waiting[0]
        if job.chunks is not None or not head.is_long:
            return True
        if all(other.chunks is None for other in self._jobs):
            return True
        return self._held_bytes() + job.scorer(scorer).model.key_value_bytes * head.batch.tokens <= STATE_BYTES

    def _score(self, scorer: Scorer, queued: QueuedBatch, turn: int) -> None:
        """Score a batch. If it fails and several jobs share it, each is tried alone, and fails alone."""
        jobs = list({id(item.job): item.job for item in queued.items}.values())
        start = time.perf_counter()
        try:
            for job in jobs:
                if job.submitted is not None:
                    job.context.run(self.observer.started, start - job.submitted)
                    job.submitted = None
            seconds = 0.0
            if queued.is_long:
                if not self._run_chunk(scorer, queued, turn):
                    jobs[0].chunk_seconds += time.perf_counter() - start
                    return
                seconds, jobs[0].chunk_seconds = jobs[0].chunk_seconds, 0.0
            else:
                self._forward(scorer, queued, resumes=queued.resumes)
            self._size.succeeded()
            seconds += time.perf_counter() - start
            self.observer.ran_batch(len(queued.items), queued.batch.tokens, seconds)
        except BaseException as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            for job in jobs:
                self._score(scorer, queued.select(i for i, item in enumerate(queued.items) if item.job is job), turn)

    def _fail(self, job: Job, error: BaseException) -> None:
        job.fail(error)
        self._jobs.remove(job)

    def _next_batch(self, scorer: Scorer, job: Job, turn: int) -> QueuedBatch:
        """Take a job's next batch, and fill it up with those of others or, if it waits alone, with its own."""
        others = [other for other in self._jobs if other is not job and other.waiting and not other.future.cancelled()]
        budget = self._size.tokens
        batches = [self._take(scorer, job, turn if others else budget, turn)]
        if not self._share or batches[0].is_long:
            return batches[0]
        for other in self._turns.order(others, turn) or [job] * len(job.waiting):
            self._cut(scorer, other, turn if others else budget, turn)
            head = other.waiting[0]
            fits = joined_tokens([*(part.batch for part in batches), head.batch]) <= budget
            if fits and head.kind == batches[0].kind and not head.is_long:
                batches.append(self._take(scorer, other, budget, turn))
            elif not others:
                break
        return join_batches(batches)

    def _cut(self, scorer: Scorer, job: Job, limit: int, turn: int) -> None:
        """Divide a job's next batch into batches of at most `limit` tokens, as far as its sequences allow.

        Batches that were planned with other prefixes than are cached now are planned again, together.
        """
        queued = job.waiting[0]
        if job.chunks is not None:
            return
        if queued.is_current:
            if len(queued.items) == 1 or queued.batch.tokens <= limit:
                return
            items = job.waiting.popleft().items
        else:
            items = []
            while job.waiting and not job.waiting[0].is_current:
                items += job.waiting.popleft().items
        parts = plan_batches(job.scorer(scorer).model, items, limit, turn, resumes=queued.resumes)
        job.waiting.extendleft(reversed(parts))

    def _take(self, scorer: Scorer, job: Job, limit: int, turn: int) -> QueuedBatch:
        """Take a job's next batch, of at most `limit` tokens, and count it as the job's turn."""
        self._cut(scorer, job, limit, turn)
        queued = job.waiting.popleft()
        tokens = min(queued.batch.tokens, turn) if queued.is_long else queued.batch.tokens
        self._turns.charge(job, tokens, len(self._jobs))
        return queued

    def _run_chunk(self, scorer: Scorer, queued: QueuedBatch, turn: int) -> bool:
        """Run a chunk of a long sequence; True if it was the last."""
        (item,) = queued.items
        job, model = item.job, item.job.scorer(scorer).model
        if job.chunks is None:
            job.chunk_bytes = model.key_value_bytes * len(item.ids)
        try:
            if job.chunks is None:
                job.chunks = self._chunks(model, job, item, turn)
            logit = next(job.chunks)
        except MemoryError as error:
            job.end_chunks()
            if not self._clear_prefixes() and not self._free_states():
                raise _too_long(item) from error
            logit = None  # begins again
        if logit is None:
            job.waiting.appendleft(queued)
            return False
        if self._prefixes is not None and item.key is not None and job.new_prefix is not None:
            self._prefixes.put(model, item.key, job.new_prefix)
        job.end_chunks()
        job.record(item, logit)
        return True

    def _chunks(self, model: Model, job: Job, item: Item, turn: int) -> Iterator[float | None]:
        """Begin a long sequence, after its cached prefix if it has one."""
        if self._prefixes is None or item.key is None:
            return model.chunks(item.ids, turn)
        cached, job.new_prefix = self._prefixes.begin(model, item.key)
        return model.chunks(item.ids, turn, cached, job.new_prefix)

    def _forward(self, scorer: Scorer, queued: QueuedBatch, *, resumes: bool) -> None:
        """Run a batch.

        If memory runs out, first the prefix cache is cleared, then all partial hidden states are freed; after that the
        batch is halved.
        """
        items, number = queued.items, len(queued.items)
        adapted = items[0].job.scorer(scorer)
        logits: list[float] | None
        try:
            if items[0].job.estimating:
                logits, states = adapted.estimates(queued.batch, [item.passage for item in items])
                for item, partial in zip(items, states, strict=True):
                    item.job.keep(item, partial)
            elif self._prefixes is not None and not resumes and any(item.key for item in items):
                logits = self._prefixes.score(adapted.model, queued.batch, [item.key for item in items])
            else:
                states = [item.job.states.get(item.ids) for item in items] if resumes else []
                logits = adapted.model.logits(queued.batch, [] if None in states else states)
        except MemoryError as error:
            has_cleared = self._clear_prefixes()
            has_freed = not has_cleared and self._free_states()
            if number == 1 and not has_cleared and not has_freed:
                raise _too_long(items[0]) from error
        else:
            if logits is None:  # a cached prefix of the plan has been evicted
                for part in plan_batches(adapted.model, items, self._size.tokens, self._size.turn, resumes=resumes):
                    self._forward(scorer, part, resumes=resumes)
                return
            for item, logit in zip(items, logits, strict=True):
                item.job.record(item, logit)
            return
        if has_cleared or has_freed:
            self._forward(scorer, queued, resumes=resumes and not has_freed)
            return
        half = (number + 1) // 2
        halves = [queued.select(range(half)), queued.select(range(half, number))]
        self._size.out_of_memory(halves[0].batch.tokens)
        for part in halves:
            self._forward(scorer, part, resumes=resumes)

    def _clear_prefixes(self) -> bool:
        """Clear the prefix cache; True if it held any."""
        return self._prefixes is not None and self._prefixes.clear()

    def _free_states(self) -> bool:
        """Free the partial hidden states of all jobs, which are then recomputed; True if there were any."""
        holding = [job for job in self._jobs if job.states]
        for job in holding:
            job.drop_states()
        return bool(holding)


def _closed_error() -> RerankError:
    return RerankerClosedError("the reranker was closed before these pairs were scored")


def _too_long(item: Item) -> RerankError:
    return ScoringError(
        f"out of memory for a single pair of {len(item.ids)} tokens; lower max_length, or use a smaller dtype or "
        "another device"
    )
