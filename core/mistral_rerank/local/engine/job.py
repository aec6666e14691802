"""One call inside the engine: its pairs, their tokens, the batches that wait, and the logits so far."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mistral_rerank.local.engine.tokenizer import EncodedPair
    from mistral_rerank.reranker import Overflow, Pair, Score


class Cost(Protocol):
    """What a batch computes; the sum of two is that of both in one batch."""

    @property
    def tokens(self) -> int:
        """How many tokens."""

    def __add__(self, other: Self, /) -> Self: ...


class Scorer(Protocol):
    """What the engine needs of a loaded model."""

    @property
    def state_bytes(self) -> int:
        """What `estimates` keeps of each token."""

    def slices(self, pairs: Sequence[Pair], overflow: Overflow | None, *, locate: bool) -> Iterator[list[EncodedPair]]:
        """Tokenize pairs in input order, in steps of bounded work; a step gives some of them, or none yet.

        Args:
            pairs: questions with passages.
            overflow: what happens to those over the limit; None for the model's own choice.
            locate: whether to say where the passages are.

        """

    def plan(self, sequences: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
        """Put sequences into batches that compute at most `budget` tokens: lists of positions."""

    def cost(self, sequences: Sequence[Sequence[int]]) -> Cost:
        """Say what a batch of these sequences computes."""

    def logits(self, sequences: Sequence[Sequence[int]], partial_states: Sequence[Any]) -> list[float]:
        """Score one batch of sequences, resuming from `partial_states` if there are any.

        Raises:
            MemoryError: the batch does not fit.

        """

    def estimates(self, sequences: Sequence[Sequence[int]], passages: Sequence[range]) -> tuple[list[float], list[Any]]:
        """Estimate the logits of one batch, likewise, and give what is begun of each sequence.

        `passages` says where in them the passages are.
        """

    def score(self, logit: float, tokens: int) -> Score:
        """Make a score of a logit and the tokens read for it; ScoringError when it is not finite."""


class Choice(Protocol):
    """Of a call in two passes: which pairs are estimated, and which are scored after that."""

    @property
    def over_depth(self) -> Sequence[Pair]:
        """The pairs to estimate."""

    def choose(self, estimates: Sequence[Score]) -> Sequence[Pair]:
        """Take the estimates and give the pairs to score."""


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence of one job, and the pairs that it belongs to: equal pairs are scored once."""

    job: Job
    pairs: tuple[int, ...]
    ids: tuple[int, ...]
    passage: range


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences that share a forward; `goes_on` says that the states of all of them were kept."""

    items: list[Item]
    cost: Any  # of the scorer's own kind
    goes_on: bool = False

    @property
    def kind(self) -> tuple[bool, bool]:
        """What is done with them; batches of one kind may be joined."""
        return self.items[0].job.estimating, self.goes_on


class Job:
    """What one caller asked for.

    Attributes:
        future: gives the scores of `pairs`, or of those that were chosen.
        estimating: whether this is the first of two passes.
        waiting: batches of this pass that have not run.
        states: what the first pass keeps of sequences for the second.
        need: bytes that the states of all sequences of the first pass take.
        granted: bytes that the states may take.
        came: when the call came; None once its first batch has begun.
        tokenizing: seconds that tokenizing took.

    """

    def __init__(self, pairs: Sequence[Pair], overflow: Overflow | None, choice: Choice | None) -> None:
        self.future: Future[list[Score]] = Future()
        self.estimating = choice is not None
        self.waiting: deque[Batch] = deque()
        self.states: dict[tuple[int, ...], Any] = {}
        self.need = self.granted = 0
        self.came: float | None = time.perf_counter()
        self.tokenizing = 0.0
        self._pairs, self._overflow, self._choice = pairs, overflow, choice
        self._steps: Iterator[list[EncodedPair]] | None = None
        self._encoded: list[EncodedPair] = []
        self._logits: list[float] = []
        self._tokens: list[int] = []
        self._room = 0
        self._state_bytes = 0

    def tokenize(self, scorer: Scorer) -> bool:
        """Tokenize some of the pairs; whether these were the last."""
        partial_states = time.perf_counter()
        if self._steps is None:
            self._steps = scorer.slices(self._pairs, self._overflow, locate=self.estimating)
        if len(self._encoded) < len(self._pairs):
            self._encoded += next(self._steps)
        self.tokenizing += time.perf_counter() - partial_states
        return len(self._encoded) == len(self._pairs)

    def plan(self, scorer: Scorer, budget: int) -> None:
        """Put the sequences of the first pass into batches."""
        if self._choice is None:
            self._plan(scorer, budget, self._encoded)
            return
        by_pair = dict(zip(self._pairs, self._encoded, strict=True))
        self._plan(scorer, budget, [by_pair[pair] for pair in self._choice.over_depth])
        self._state_bytes = scorer.state_bytes
        self.need = self._state_bytes * sum(len(item.ids) for batch in self.waiting for item in batch.items)

    def _plan(self, scorer: Scorer, budget: int, encoded: Sequence[EncodedPair]) -> None:
        owners: dict[tuple[int, ...], list[int]] = {}
        passages: dict[tuple[int, ...], range] = {}
        for position, pair in enumerate(encoded):
            for ids, passage in zip(map(tuple, pair.sequences), pair.passages, strict=True):
                owners.setdefault(ids, []).append(position)
                passages.setdefault(ids, passage)
        items = [Item(self, tuple(pairs), ids, passages[ids]) for ids, pairs in owners.items()]
        self.states = {ids: states for ids, states in self.states.items() if ids in owners}
        for goes_on in (False, True):
            some = [item for item in items if (item.ids in self.states) == goes_on]
            self.waiting += batches(scorer, some, budget, goes_on=goes_on) if some else []
        self._logits = [float("-inf")] * len(encoded)
        self._tokens = [sum(map(len, pair.sequences)) for pair in encoded]

    def grant(self, granted: int) -> None:
        """Allow the states to take so many bytes."""
        self.granted = self._room = granted

    def keep(self, item: Item, states: Any) -> None:
        """Keep the states of a sequence, while there is room."""
        size = len(item.ids) * self._state_bytes
        if self._room >= size and item.ids not in self.states:
            self._room -= size
            self.states[item.ids] = states

    def drop_states(self) -> None:
        """Free the states, and keep no more."""
        self.states.clear()
        self._room = 0

    def record(self, item: Item, logit: float) -> None:
        """Keep the best of a pair's chunks; a logit that is not a number stays one."""
        if not self.estimating:
            self.states.pop(item.ids, None)
        for pair in item.pairs:
            self._logits[pair] = logit if logit != logit else max(self._logits[pair], logit)

    def advance(self, scorer: Scorer, budget: int) -> bool:
        """After the last batch of a pass: begin the second, or resolve the future; whether the job is over."""
        try:
            scores = [scorer.score(*pair) for pair in zip(self._logits, self._tokens, strict=True)]
            if self.estimating and self._choice is not None:
                by_pair = dict(zip(self._pairs, self._encoded, strict=True))
                self.estimating = False
                self._plan(scorer, budget, [by_pair[pair] for pair in self._choice.choose(scores)])
                self.granted = self._state_bytes * sum(map(len, self.states))
                return not self.waiting and self.advance(scorer, budget)
        except BaseException as error:
            self.fail(error)
            return True
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(scores)
        return True

    def fail(self, error: BaseException) -> None:
        """Give up; the caller gets `error`."""
        self.waiting.clear()
        self.states.clear()
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


def batches(scorer: Scorer, items: list[Item], budget: int, *, goes_on: bool) -> list[Batch]:
    """Put items into batches of at most `budget` tokens."""
    planned = [[items[i] for i in positions] for positions in scorer.plan([item.ids for item in items], budget)]
    return [Batch(batch, scorer.cost([item.ids for item in batch]), goes_on) for batch in planned]
