"""The interface of all rerankers.

A reranker scores (question, passage) pairs. Ordering, `top_n` and `min_score` follow from the scores, for all
rerankers alike. This module knows no model, no transport and no framework.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from mistral_rerank._deadline import in_thread, result_within, within
from mistral_rerank.errors import InvalidInputError, SettingsError
from mistral_rerank.inputs import CheckedPairs, TextPairs, check_passages, check_ranking
from mistral_rerank.scores import Highlights, Ranking, order, usage_of
from mistral_rerank.sentences import SentencePairs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

    from mistral_rerank.scores import Pair, Score

Overflow = Literal["truncate", "chunk", "error"]
"""What happens to a pair over the model's limit: the passage is truncated, scored in chunks, or rejected."""

Quantization = Literal["int8", "nf4"]
"""The quantization of a local model's linears."""

ProtocolName = Literal["nvidia", "cohere", "jina", "vllm", "tei", "voyage"]
"""The protocol of an endpoint, as `mistral_rerank.protocols` defines it."""

Unit = Literal["logit", "probability"]
"""The unit of an endpoint's scores."""


@dataclass(frozen=True, slots=True)
class PassageLimits:
    """How much of a long passage is read.

    Attributes:
        tokens: most tokens of a passage; the others are left out. A pair that is then over the model's limit is treated
            as `overflow` says.
        chunks: most chunks of a passage; pairs over the model's limit are then scored in chunks.

    Raises:
        InvalidInputError: a limit is under 1.

    """

    tokens: int | None = None
    chunks: int | None = None

    def __post_init__(self) -> None:
        if min(self.tokens or 1, self.chunks or 1) < 1 or 0 in (self.tokens, self.chunks):
            raise InvalidInputError(f"the limits of a passage are {self}; give at least 1, or None for no limit")


class Observer:
    """Receives engine events, on the engine's threads. The default implementation ignores them."""

    def tokenized(self, seconds: float) -> None:
        """Note that a call was tokenized in so many seconds."""

    def started(self, waited: float) -> None:
        """Note that a call's first batch starts, so many seconds after the call was submitted."""

    def ran_batch(self, sequences: int, tokens: int, seconds: float) -> None:
        """Note that a batch ran; `tokens` includes padding."""

    def used_prefixes(self, hits: int, misses: int, tokens_saved: int, cache_bytes: int) -> None:
        """Note the distinct passages of a batch, as `PassageCacheInfo` counts them, and the cache's size after it."""


@dataclass(frozen=True, slots=True)
class PassageCacheInfo:
    """The counts of a passage cache.

    Attributes:
        hits: passages, or instructions, whose keys and values were cached, counted once a batch.
        misses: those whose keys and values were computed.
        tokens_saved: tokens of the hits.
        entries: number of cached passages.
        bytes: the memory that they take.
        limit: the most memory that they may take, in bytes.

    """

    hits: int
    misses: int
    tokens_saved: int
    entries: int
    bytes: int
    limit: int


class Reranker(ABC):
    """Scores pairs and ranks passages. Thread-safe, and usable as a context manager, synchronous or asynchronous.

    Subclasses implement `score_pairs` and `ascore_pairs`. A deep copy returns the same reranker, so that weights and
    connections are not duplicated.

    Attributes:
        max_length: the most tokens of a pair, if a limit was set.
        adapters: names of adapters that share the model's weights; `adapter` of a call selects one.

    """

    max_length: int | None = None
    adapters: tuple[str, ...] = ()
    is_closed = False
    """Whether the reranker has been closed."""

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    @property
    @abstractmethod
    def model_name(self) -> str:
        """The name of the model in traces and reports."""

    @property
    def shares_passages(self) -> bool:
        """Whether pairs of a call that have the same passage, not the same question, share computation."""
        return False

    @abstractmethod
    def score_pairs(
        self,
        pairs: Sequence[Pair],
        *,
        overflow: Overflow | None = None,
        instruction: str | None = None,
        limits: PassageLimits | None = None,
        adapter: str | None = None,
    ) -> list[Score]:
        """Score every (question, passage) pair, in input order.

        A passage that is empty or blank is not scored: it gets `BLANK_SCORE`, whose probability is 0.

        Args:
            pairs: questions with passages; any iterable.
            overflow: what happens to pairs over the limit in this call; None for the reranker's default.
            instruction: what counts as relevant in this call, for models that take an instruction; None for the
                reranker's default.
            limits: how much of each passage is read in this call.
            adapter: one of `adapters`, or at an endpoint the name of another model there; None for the model itself.

        Raises:
            InvalidInputError: a text is not a string, a question is blank, an input is too long, the model has no
                place for an instruction, or there is no such adapter.
            ScoringError: the model returned no usable score. There is never a partial result.

        """

    @abstractmethod
    async def ascore_pairs(
        self,
        pairs: Sequence[Pair],
        *,
        overflow: Overflow | None = None,
        instruction: str | None = None,
        limits: PassageLimits | None = None,
        adapter: str | None = None,
    ) -> list[Score]:
        """`score_pairs` without blocking the event loop; cancelling drops the call from the queue."""

    def rank(
        self,
        query: str,
        passages: Sequence[str],
        *,
        top_n: int | None = None,
        min_score: float | None = None,
        max_gap: float | None = None,
        overflow: Overflow | None = None,
        instruction: str | None = None,
        limits: PassageLimits | None = None,
        adapter: str | None = None,
        deadline: float | None = None,
    ) -> Ranking:
        """Order passages by how well they answer the question, best first.

        Args:
            query: the question.
            passages: the candidates; any iterable. Duplicates are kept and differ in their index. Blank passages rank
                last, with probability 0.
            top_n: the most passages to return; None for all. 0 returns an empty list without scoring.
            min_score: drop passages below this probability, before `top_n` is applied.
            max_gap: drop passages whose logit is further than this below the best one's, before `top_n` is applied.
            overflow: as in `score_pairs`.
            instruction: as in `score_pairs`.
            limits: as in `score_pairs`.
            adapter: as in `score_pairs`.
            deadline: the most seconds to wait for the scores; None for no limit, or an endpoint's `timeout`. A late
                call leaves the queue, and a batch that runs is not waited for.

        Returns:
            Passages sorted by (-logit, index).

        Raises:
            InvalidInputError: as `score_pairs`, or `top_n` or `max_gap` negative, or `min_score` outside [0, 1], or
                `deadline` not positive.
            DeadlineExceededError: the deadline was over before there were scores.

        """
        passages = check_passages(query, passages)
        if not check_ranking(passages, top_n=top_n, min_score=min_score, max_gap=max_gap, deadline=deadline):
            return Ranking()
        call = TextPairs(CheckedPairs((query, passage) for passage in passages))
        scores = self._scores(
            call.pairs, deadline, call_options(self.score_pairs, overflow, instruction, limits, adapter)
        )
        ranking = order(passages, call.complete(scores), top_n=top_n, min_score=min_score, max_gap=max_gap)
        ranking.usage = usage_of(scores)
        return ranking

    async def arank(
        self,
        query: str,
        passages: Sequence[str],
        *,
        top_n: int | None = None,
        min_score: float | None = None,
        max_gap: float | None = None,
        overflow: Overflow | None = None,
        instruction: str | None = None,
        limits: PassageLimits | None = None,
        adapter: str | None = None,
        deadline: float | None = None,
    ) -> Ranking:
        """`rank` without blocking the event loop."""
        passages = check_passages(query, passages)
        if not check_ranking(passages, top_n=top_n, min_score=min_score, max_gap=max_gap, deadline=deadline):
            return Ranking()
        call = TextPairs(CheckedPairs((query, passage) for passage in passages))
        scores = await self._ascores(
            call.pairs, deadline, call_options(self.ascore_pairs, overflow, instruction, limits, adapter)
        )
        ranking = order(passages, call.complete(scores), top_n=top_n, min_score=min_score, max_gap=max_gap)
        ranking.usage = usage_of(scores)
        return ranking

    def highlight(
        self,
        query: str,
        passages: Sequence[str],
        *,
        instruction: str | None = None,
        adapter: str | None = None,
        deadline: float | None = None,
    ) -> Highlights:
        """Find the sentence of each passage that answers the question best. All sentences are scored in one call.

        Raises:
            InvalidInputError: as `score_pairs`.
            DeadlineExceededError: the deadline was over before there were scores.

        """
        sentences = SentencePairs(query, check_passages(query, passages))
        pairs = CheckedPairs(sentences.pairs)
        scores = self._scores(pairs, deadline, call_options(self.score_pairs, None, instruction, None, adapter))
        return _highlights(sentences, scores)

    async def ahighlight(
        self,
        query: str,
        passages: Sequence[str],
        *,
        instruction: str | None = None,
        adapter: str | None = None,
        deadline: float | None = None,
    ) -> Highlights:
        """`highlight` without blocking the event loop."""
        sentences = SentencePairs(query, check_passages(query, passages))
        pairs = CheckedPairs(sentences.pairs)
        scores = await self._ascores(pairs, deadline, call_options(self.ascore_pairs, None, instruction, None, adapter))
        return _highlights(sentences, scores)

    def _scores(self, pairs: Sequence[Pair], deadline: float | None, options: dict[str, Any]) -> list[Score]:
        if not pairs:
            return []
        if deadline is None:
            return self.score_pairs(pairs, **options)
        return self._score_within(deadline, pairs, **options)

    async def _ascores(self, pairs: Sequence[Pair], deadline: float | None, options: dict[str, Any]) -> list[Score]:
        if not pairs:
            return []
        if deadline is None:
            return await self.ascore_pairs(pairs, **options)
        return await self._ascore_within(deadline, pairs, **options)

    def _score_within(self, seconds: float, pairs: Sequence[Pair], **options: Any) -> list[Score]:
        """`score_pairs` with a deadline; without a better way in a thread, where a late call runs on."""
        return result_within(seconds, in_thread(lambda: self.score_pairs(pairs, **options)))

    async def _ascore_within(self, seconds: float, pairs: Sequence[Pair], **options: Any) -> list[Score]:
        """`ascore_pairs` with a deadline, which cancels it."""
        async with within(seconds):
            return await self.ascore_pairs(pairs, **options)

    def prepare(self, passages: Iterable[str], *, progress: Callable[[int], object] | None = None) -> None:  # noqa: ARG002
        """Compute passages ahead into the passage cache, so that the first question about them is fast too.

        Args:
            passages: texts, which are read as needed; blank ones are skipped.
            progress: receives the number of passages done, again and again.

        Raises:
            SettingsError: there is no passage cache, or the model reads the question before the passage.

        """
        raise SettingsError("only a model on this machine has a passage cache")

    def weights_checksum(self) -> str | None:
        """Return a checksum of the model's files; None if they are not on this machine."""
        return None

    def weight_bytes(self) -> int:
        """Return the bytes that the model's weights take on this machine, loaded or not; 0 if they are elsewhere."""
        return 0

    def observe(self, observer: Observer) -> None:  # noqa: B027 - only local rerankers have events
        """Send engine events to `observer` from now on."""

    def close(self) -> None:
        """Free the reranker's resources; calling it twice is harmless."""
        self.is_closed = True

    async def aclose(self) -> None:
        """`close` for asynchronous code."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def call_options(
    score_pairs: Callable[..., object],
    overflow: Overflow | None,
    instruction: str | None,
    limits: PassageLimits | None,
    adapter: str | None,
) -> dict[str, Any]:
    """Return the options of a call, without those that are None: a reranker of a user's own may lack some.

    Args:
        score_pairs: `score_pairs` or `ascore_pairs` of the reranker.
        overflow: as there, like the others.
        instruction: likewise.
        limits: likewise.
        adapter: likewise.

    Raises:
        InvalidInputError: the reranker lacks an option of the call.

    """
    options = {"instruction": instruction, "limits": limits, "adapter": adapter}
    options = {name: value for name, value in options.items() if value is not None}
    if options:
        parameters = inspect.signature(score_pairs).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if not takes_all and (lacking := options.keys() - parameters.keys()):
            raise InvalidInputError(f"this model takes no {' and no '.join(sorted(lacking))}; leave it out")
    return {"overflow": overflow} | options


def _highlights(sentences: SentencePairs, scores: Sequence[Score]) -> Highlights:
    highlights = Highlights(sentences.best([score.logit for score in scores]))
    highlights.usage = usage_of(scores)
    return highlights
