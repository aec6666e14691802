"""A job: one call inside the engine, with its tokens, waiting batches and logits so far."""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from mistral_rerank.local.batching.planning import Batch, join
from mistral_rerank.local.engine.prefix_cache import PrefixModel, prefix_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mistral_rerank.local.engine.batch_size import BatchSize
    from mistral_rerank.local.engine.prefix_cache import Key, PrefixCache
    from mistral_rerank.local.engine.tokenizer import Cut, EncodedPair
    from mistral_rerank.reranker import Overflow
    from mistral_rerank.scores import Pair, Score

logger = logging.getLogger(__name__)

CUT = (
    "%d of %d passages were over the limit and were cut: tokens_left_out of a score counts their unread tokens; "
    "overflow='chunk' reads all of them"
)
"""A warning for the first such call of the process, information for the others."""
_cut_calls = count()


class Model(PrefixModel, Protocol):
    """What the engine needs of a model."""

    @property
    def key_value_bytes(self) -> int:
        """Bytes that `chunks` keeps for a token of a sequence; 0 for a model that computes sequences whole."""

    def plan(self, sequences: Sequence[Sequence[int]], budget: int, cached: Sequence[int] = ()) -> list[Batch]:
        """Put sequences into batches of at most `budget` computed tokens; `cached` are lengths of cached prefixes."""

    def logits(self, batch: Batch, partial_states: Sequence[Any]) -> list[float]:
        """Score one batch, resuming from `partial_states` if there are any.

        Raises:
            MemoryError: the batch does not fit into memory.

        """

    def chunks(
        self, sequence: Sequence[int], tokens: int, cached: Any | None = None, new: Any | None = None
    ) -> Iterator[float | None]:
        """Score one sequence in chunks that cost as much as `tokens` tokens; the last yields the logit, others None.

        It begins after a cached prefix, and fills a new one with the last chunk. Raises MemoryError like `logits`.
        """


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    def slices(
        self, pairs: Sequence[Pair], overflow: Overflow | Cut | None, *, instruction: str | None, locate: bool
    ) -> Iterator[list[EncodedPair]]:
        """Tokenize pairs in input order, in steps of bounded work; a step yields some of them, or none yet.

        Args:
            pairs: questions with passages.
            overflow: what happens to pairs over the limit, or also what is read of passages; None for the checkpoint's
                default.
            instruction: to the model; None for the checkpoint's default.
            locate: whether to find the passages' tokens and the questions'.

        """


class Scorer(Protocol):
    """What the engine needs of a loaded checkpoint."""

    @property
    def adapters(self) -> Mapping[str, Scorer]:
        """The adapters that share the model's weights, by name."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""

    @property
    def model(self) -> Model:
        """The model."""

    @property
    def state_bytes(self) -> int:
        """Bytes that the partial hidden state of a token takes."""

    def estimates(self, batch: Batch, passages: Sequence[range]) -> tuple[list[float], list[Any]]:
        """Estimate the logits of one batch; also return the partial hidden states of each sequence.

        `passages` are the passages' tokens. Raises MemoryError like `Model.logits`.
        """

    def score(self, logit: float, *, tokens: int) -> Score:
        """Make a score of a logit and a number of tokens; ScoringError if the logit is not finite."""


class Choice(Protocol):
    """A cascade: which pairs the first pass estimates, and which ones the second scores."""

    @property
    def over_depth(self) -> Sequence[Pair]:
        """The pairs to estimate."""

    def choose(self, estimates: Sequence[Score]) -> Sequence[Pair]:
        """Choose the pairs to score from the estimates."""


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence of a job, and the positions of its pairs: equal pairs are scored once.

    `key` is that of its prefix in the prefix cache; None for none.
    """

    job: Job
    pairs: tuple[int, ...]
    ids: tuple[int, ...]
    passage: range
    key: Key | None = None


@dataclass(frozen=True, slots=True)
class QueuedBatch:
    """A batch and the items of its sequences.

    Attributes:
        items: of the sequences.
        batch: the batch.
        resumes: whether it resumes from partial hidden states of all of them.
        is_long: whether it is one sequence that is computed in chunks.

    """

    items: list[Item]
    batch: Batch
    resumes: bool = False
    is_long: bool = False

    @property
    def is_current(self) -> bool:
        """Whether the batch was planned with the prefixes that are cached now."""
        prefixes = self.items[0].job.prefixes
        if prefixes is None or self.resumes:
            return True
        planned = [0] * len(self.items)
        for group in self.batch.groups or ():
            for member in group.members:
                planned[member] = group.cached
        return planned == prefixes.cached_tokens([item.key for item in self.items])

    @property
    def kind(self) -> tuple[object, ...]:
        """Which forward it needs; batches of the same kind can be joined."""
        job = self.items[0].job
        return job.adapter, job.estimating, self.resumes, self.batch.frequencies

    def select(self, positions: Iterable[int]) -> QueuedBatch:
        """Make a batch of some of the items."""
        part = self.batch.select(positions)
        return QueuedBatch([self.items[member] for member in part.members], part, self.resumes)


class Job:
    """One call.

    Attributes:
        future: the scores of `pairs`, or of those that `choice` chooses.
        adapter: the name of the adapter to score with; None for the model itself.
        estimating: whether this is the first of two passes.
        waiting: batches of the current pass that have not run.
        states: partial hidden states of the first pass, by token ids.
        need: bytes of the partial hidden states of all sequences in the first pass.
        granted: bytes that the partial hidden states may take.
        chunks: of the first waiting batch, a long sequence that has begun; None if it has not.
        chunk_bytes: bytes that its keys and values take in the end.
        new_prefix: receives its prefix, for the prefix cache; None if it is not cached.
        chunk_seconds: seconds that its chunks have run.
        virtual_time: when its next batch begins, as a fair scheduler counts time; see `turns`.
        submitted: when the call was submitted; None after its first batch has started.
        tokenizing: seconds of tokenizing.
        context: of the caller, in which the events of the call are observed.
        prefixes: the prefix cache; None for none.

    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        overflow: Overflow | Cut | None,
        instruction: str | None,
        choice: Choice | None,
        adapter: str | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.prefixes = prefixes
        self.future: Future[list[Score]] = Future()
        self.adapter = adapter
        self.estimating = choice is not None
        self.waiting: deque[QueuedBatch] = deque()
        self.states: dict[tuple[int, ...], Any] = {}
        self.need = self.granted = self.chunk_bytes = 0
        self.chunks: Iterator[float | None] | None = None
        self.new_prefix: Any = None
        self.chunk_seconds = self.virtual_time = 0.0
        self.submitted: float | None = time.perf_counter()
        self.tokenizing = 0.0
        self.context = copy_context()
        self._pairs, self._overflow, self._instruction, self._choice = pairs, overflow, instruction, choice
        self._steps: Iterator[list[EncodedPair]] | None = None
        self._encoded: list[EncodedPair] = []
        self._logits: list[float] = []
        self._tokens: list[int] = []
        self._left_out: list[int] = []
        self._room = 0
        self._state_bytes = 0

    def scorer(self, loaded: Scorer) -> Scorer:
        """Return the scorer of the job's adapter."""
        return loaded if self.adapter is None else loaded.adapters[self.adapter]

    def tokenize(self, loaded: Scorer) -> bool:
        """Tokenize some of the pairs; True if these were the last."""
        start = time.perf_counter()
        if self._steps is None:
            self._steps = self.scorer(loaded).tokenizer.slices(
                self._pairs,
                self._overflow,
                instruction=self._instruction,
                locate=self.estimating or self.prefixes is not None,
            )
        if len(self._encoded) < len(self._pairs):
            self._encoded += next(self._steps)
        self.tokenizing += time.perf_counter() - start
        is_done = len(self._encoded) == len(self._pairs)
        if is_done and (truncated := sum(pair.tokens_left_out > 0 for pair in self._encoded)):
            level = logging.INFO if next(_cut_calls) else logging.WARNING
            logger.log(level, CUT, truncated, len(self._pairs))
        return is_done

    def plan(self, loaded: Scorer, size: BatchSize) -> None:
        """Plan the batches of the first pass."""
        scorer = self.scorer(loaded)
        if self._choice is None:
            self._plan(scorer, size, self._encoded)
            return
        by_pair = dict(zip(self._pairs, self._encoded, strict=True))
        self._plan(scorer, size, [by_pair[pair] for pair in self._choice.over_depth])
        self._state_bytes = scorer.state_bytes
        self.need = self._state_bytes * sum(len(item.ids) for batch in self.waiting for item in batch.items)

    def _plan(self, scorer: Scorer, size: BatchSize, encoded: Sequence[EncodedPair]) -> None:
        owners: dict[tuple[int, ...], list[int]] = {}
        passages: dict[tuple[int, ...], range] = {}
        keys: dict[tuple[int, ...], Key | None] = {}
        has_prefixes = self.prefixes is not None and not self.estimating and scorer.model.prefix_bytes > 0
        for position, pair in enumerate(encoded):
            questions = pair.questions if has_prefixes else (0,) * len(pair.sequences)
            for ids, passage, question in zip(map(tuple, pair.sequences), pair.passages, questions, strict=True):
                owners.setdefault(ids, []).append(position)
                passages.setdefault(ids, passage)
                keys.setdefault(ids, prefix_key(ids, question, self.adapter))
        items = [Item(self, tuple(pairs), ids, passages[ids], keys[ids]) for ids, pairs in owners.items()]
        self.states = {ids: states for ids, states in self.states.items() if ids in owners}
        for resumes in (False, True):
            alike = [item for item in items if (item.ids in self.states) == resumes]
            if alike:
                self.waiting += plan_batches(scorer.model, alike, size.tokens, size.turn, resumes=resumes)
        self._logits = [float("-inf")] * len(encoded)
        self._tokens = [sum(map(len, pair.sequences)) for pair in encoded]
        self._left_out = [pair.tokens_left_out for pair in encoded]

    def grant(self, granted: int) -> None:
        """Allow the partial hidden states to take so many bytes."""
        self.granted = self._room = granted

    def keep(self, item: Item, states: Any) -> None:
        """Keep the partial hidden states of a sequence if the grant has room."""
        size = len(item.ids) * self._state_bytes
        if self._room >= size and item.ids not in self.states:
            self._room -= size
            self.states[item.ids] = states

    def drop_states(self) -> None:
        """Free the partial hidden states, and keep no more."""
        self.states.clear()
        self._room = 0

    def record(self, item: Item, logit: float) -> None:
        """Record a logit; the best chunk of a pair counts, and NaN is kept."""
        if not self.estimating:
            self.states.pop(item.ids, None)
        for pair in item.pairs:
            self._logits[pair] = logit if logit != logit else max(self._logits[pair], logit)

    def advance(self, loaded: Scorer, size: BatchSize) -> bool:
        """After the last batch of a pass, start the second or resolve the future; True if the job is done."""
        scorer = self.scorer(loaded)
        try:
            scores = [
                scorer.score(logit, tokens=tokens) for logit, tokens in zip(self._logits, self._tokens, strict=True)
            ]
            scores = [
                replace(score, tokens_left_out=left_out) if left_out else score
                for score, left_out in zip(scores, self._left_out, strict=True)
            ]
            if self.estimating and self._choice is not None:
                by_pair = dict(zip(self._pairs, self._encoded, strict=True))
                self.estimating = False
                self._plan(scorer, size, [by_pair[pair] for pair in self._choice.choose(scores)])
                self.granted = self._state_bytes * sum(map(len, self.states))
                return not self.waiting and self.advance(loaded, size)
        except BaseException as error:
            self.fail(error)
            return True
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(scores)
        return True

    def end_chunks(self) -> None:
        """Free the keys and values of a long sequence."""
        self.chunks, self.new_prefix, self.chunk_bytes = None, None, 0

    def fail(self, error: BaseException) -> None:
        """Fail the call with `error`."""
        self.waiting.clear()
        self.end_chunks()
        self.states.clear()
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


def plan_batches(model: Model, items: Sequence[Item], budget: int, turn: int, *, resumes: bool) -> list[QueuedBatch]:
    """Put items of one job into batches of at most `budget` tokens, with the prefixes that are cached now.

    A sequence with more than a turn to compute is computed in chunks.
    """
    prefixes, runs_chunks = items[0].job.prefixes, model.key_value_bytes > 0 and not items[0].job.estimating
    cached = [0] * len(items) if prefixes is None or resumes else prefixes.cached_tokens([item.key for item in items])
    sequences = [item.ids for item in items]
    planned = model.plan(sequences, budget, cached) if any(cached) else model.plan(sequences, budget)
    return [
        QueuedBatch(
            [items[member] for member in batch.members],
            batch,
            resumes,
            is_long=runs_chunks and not resumes and len(batch.members) == 1 and batch.real_tokens > turn,
        )
        for batch in planned
    ]


def join_batches(batches: Sequence[QueuedBatch]) -> QueuedBatch:
    """Join batches of one kind."""
    if len(batches) == 1:
        return batches[0]
    batch, items = join([queued.batch for queued in batches]), [item for queued in batches for item in queued.items]
    return QueuedBatch([items[member] for member in batch.members], batch, batches[0].resumes)
