"""The interface of all rerankers, and the values that they return.

A reranker scores (question, passage) pairs. Ordering, `top_n` and `min_score` follow from the scores and are defined
here for all rerankers. This module knows no model, no transport and no framework.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from mistral_rerank._deadline import in_thread, result_within, within
from mistral_rerank.errors import InvalidInputError, ScoringError, SettingsError
from mistral_rerank.sentences import SentencePairs, Span

if TYPE_CHECKING:
    from types import TracebackType

Pair = tuple[str, str]
"""A question and a passage."""

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


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one pair.

    Attributes:
        logit: the raw output of the binary head, or an estimate of it (see `cascade_depth` of `LocalReranker`); higher
            is more relevant; unbounded.
        probability: sigmoid of the (calibrated) logit, in [0, 1].
        tokens: number of tokens that the model read, of the question and the passage; 0 if unknown. It does not count
            in comparisons.
        tokens_left_out: number of the passage's tokens over the limit, which the model did not read; an estimate for a
            very long passage. It does not count in comparisons.

    Raises:
        ScoringError: the logit is not finite.

    """

    logit: float
    probability: float
    tokens: int = field(default=0, compare=False)
    tokens_left_out: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if not math.isfinite(self.logit):
            raise ScoringError(
                f"the model gave a logit of {self.logit}; its weights or its dtype are unusable here "
                "(try dtype='float32')"
            )

    @classmethod
    def from_logit(cls, logit: float, *, scale: float = 1.0, bias: float = 0.0, tokens: int = 0) -> Score:
        """Make a score of a raw logit; the calibration, `scale` and `bias`, changes the probability only."""
        return cls(float(logit), sigmoid(scale * logit + bias), tokens)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call used.

    Attributes:
        tokens: that the model read, cached pairs included, or that the endpoint counted; 0 if unknown.
        search_units: that Cohere's protocol says are billed; 0 without any.

    """

    tokens: int = 0
    search_units: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.tokens + other.tokens, self.search_units + other.search_units)


class Scores(list[Score]):
    """Scores with the usage that an endpoint states."""

    usage = Usage()


def usage_of(scores: Sequence[Score]) -> Usage:
    """Return the usage that an endpoint states, or else the tokens of the scores."""
    stated = scores.usage if isinstance(scores, Scores) else Usage()
    return replace(stated, tokens=stated.tokens or sum(score.tokens for score in scores))


BLANK_SCORE = Score(-1e4, 0.0)
"""The score of a passage without text: below any logit of a model, and finite in JSON and float16."""


@dataclass(frozen=True, slots=True)
class RankedPassage:
    """A passage of a ranking.

    Attributes:
        index: its position in the input.
        highlight: start and end of its best sentence, where that was asked for.

    """

    index: int
    text: str
    score: Score
    highlight: Span | None = None


UNSCORED = Score(-1e4, 0.0)
"""The score of a passage that was not scored, because its call kept the retriever's order."""


class Highlights(list[Span | None]):
    """Start and end of the best sentence of each passage, in characters (Unicode code points); None for a blank one.

    Attributes:
        usage: of the call that scored the sentences.

    """

    usage = Usage()


class Ranking(list[RankedPassage]):
    """Passages in the order of a result.

    Attributes:
        usage: of the call, with the passages that `min_score` and `top_n` drop.
        error: why they are in the retriever's order, with `UNSCORED` as their scores; None if they are ranked.

    """

    usage = Usage()
    error: Exception | None = None

    def mark(self, highlights: Highlights) -> None:
        """Set the best sentences, and add the usage of finding them."""
        self[:] = [replace(ranked, highlight=span) for ranked, span in zip(self, highlights, strict=True)]
        self.usage += highlights.usage

    def selected(self, *, top_n: int | None, min_score: float | None, max_gap: float | None) -> Ranking:
        """Apply `min_score` and `max_gap`, then `top_n`; the order stays."""
        least = -math.inf
        if max_gap is not None and self:
            least = max(passage.score.logit for passage in self) - max_gap
        passages = [
            passage
            for passage in self
            if passage.score.logit >= least and (min_score is None or passage.score.probability >= min_score)
        ]
        selected = Ranking(passages[:top_n])
        selected.usage, selected.error = self.usage, self.error
        return selected


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


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
        scores = self._scores(call.pairs, deadline, _call_options(overflow, instruction, limits, adapter))
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
        scores = await self._ascores(call.pairs, deadline, _call_options(overflow, instruction, limits, adapter))
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
        scores = self._scores(pairs, deadline, _call_options(None, instruction, None, adapter))
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
        scores = await self._ascores(pairs, deadline, _call_options(None, instruction, None, adapter))
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


def _call_options(
    overflow: Overflow | None, instruction: str | None, limits: PassageLimits | None, adapter: str | None
) -> dict[str, Any]:
    """Return the options of a call; rerankers of users may not know all of them."""
    options = {"instruction": instruction, "limits": limits, "adapter": adapter}
    return {"overflow": overflow} | {name: value for name, value in options.items() if value is not None}


def _highlights(sentences: SentencePairs, scores: Sequence[Score]) -> Highlights:
    highlights = Highlights(sentences.best([score.logit for score in scores]))
    highlights.usage = usage_of(scores)
    return highlights


class CheckedPairs(list[Pair]):
    """Pairs that are valid, so that they are not checked again."""


class TextPairs:
    """The pairs of a call; `pairs` are those whose passages are not blank, in order."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        checked = pairs if isinstance(pairs, CheckedPairs) else check_pairs(pairs)
        self._has_text = [bool(passage) and not passage.isspace() for _, passage in checked]
        self.pairs: Sequence[Pair] = CheckedPairs(
            pair for pair, has_text in zip(checked, self._has_text, strict=True) if has_text
        )

    def complete(self, scores: Sequence[Score]) -> list[Score]:
        """Return the scores of all pairs, given those of the pairs with text."""
        if len(scores) != sum(self._has_text):
            raise ScoringError(f"{sum(self._has_text)} pairs were scored, and {len(scores)} scores came")
        remaining = iter(scores)
        return [next(remaining) if has_text else BLANK_SCORE for has_text in self._has_text]


def check_pairs(pairs: Iterable[Pair]) -> list[Pair]:
    """Validate pairs and return them as a list. Errors name the position of a pair, never its text."""
    checked: list[Pair] = []
    for position, pair in enumerate(_listed(pairs, "pairs", "a list of (question, passage)")):
        if isinstance(pair, str) or not _has_two(pair):
            raise InvalidInputError(
                f"pair {position} must be two strings (question, passage), got {_type_name(pair)}; "
                "the call is score_pairs([(question, passage), ...])"
            )
        query, passage = pair
        if not isinstance(query, str) or not isinstance(passage, str):
            kind = _type_name(passage if isinstance(query, str) else query)
            raise InvalidInputError(f"pair {position} must be two strings (question, passage), got {kind}")
        if not query.strip():
            raise InvalidInputError(f"the question of pair {position} is empty; give it some text")
        checked.append((query, passage))
    return checked


def check_query(query: str) -> None:
    """Refuse a question that is not a string, or blank."""
    if query is not None and not isinstance(query, str):
        raise InvalidInputError(
            f"the question must be a string, got {_type_name(query)}; the question comes before the passages"
        )
    if not query or query.isspace():
        raise InvalidInputError("the question is empty; give the text to rank the passages by")


def check_passages(query: str, passages: Iterable[str]) -> list[str]:
    """Refuse arguments of `rank` of the wrong types, or swapped; return the passages as a list."""
    if isinstance(passages, str) and not isinstance(query, str):
        raise InvalidInputError(
            f"the question is {_type_name(query)} and passages is one string; they look swapped: "
            "the call is rank(question, passages)"
        )
    check_query(query)
    checked = _listed(passages, "passages", "a list of strings")
    for position, passage in enumerate(checked):
        if not isinstance(passage, str):
            raise InvalidInputError(f"passage {position} must be a string, got {_type_name(passage)}")
    return checked


def check_ranking(
    passages: Sequence[str],
    *,
    top_n: int | None,
    min_score: float | None,
    max_gap: float | None,
    deadline: float | None,
) -> bool:
    """Validate the options of `rank`; return False if the result is empty for any scores."""
    if top_n is not None and top_n < 0:
        raise InvalidInputError(f"top_n is {top_n}; give 0 or more, or None for all passages")
    if min_score is not None and not 0.0 <= min_score <= 1.0:
        raise InvalidInputError(f"min_score is {min_score}; it is a probability, so give 0 to 1")
    if max_gap is not None and not max_gap >= 0:
        raise InvalidInputError(f"max_gap is {max_gap}; it is a difference of logits, so give 0 or more")
    if deadline is not None and not deadline > 0:
        raise InvalidInputError(f"deadline is {deadline}; give seconds above 0, or None for no limit")
    return len(passages) > 0 and top_n != 0


def check_adapter(name: str | None, known: Sequence[str]) -> None:
    """Refuse the name of an adapter that the model does not have; None names the model itself."""
    if name is not None and name not in known:
        given = ", ".join(known) or "none was given; open the reranker with adapters={name: folder}"
        raise InvalidInputError(f"there is no adapter {name!r:.80}; adapters: {given}")


def _listed(argument: Iterable[Any], name: str, expected: str) -> list[Any]:
    """Make a list of an argument, which may be a generator."""
    if isinstance(argument, str | bytes | Mapping) or not isinstance(argument, Iterable):
        raise InvalidInputError(f"{name} is {_type_name(argument)}; give {expected}")
    return list(argument)


def _has_two(pair: object) -> bool:
    return isinstance(pair, Sequence) and len(pair) == 2


def _type_name(argument: object) -> str:
    """Name the type of an argument for an error message, without its text."""
    return "one string" if isinstance(argument, str) else f"a {type(argument).__name__}"


def order(
    passages: Sequence[str],
    scores: Sequence[Score],
    *,
    top_n: int | None = None,
    min_score: float | None = None,
    max_gap: float | None = None,
) -> Ranking:
    """Sort by (-logit, index), then apply `min_score` and `max_gap`, then `top_n`."""
    ranking = Ranking(
        RankedPassage(index, text, score) for index, (text, score) in enumerate(zip(passages, scores, strict=True))
    )
    ranking.sort(key=lambda passage: (-passage.score.logit, passage.index))
    return ranking.selected(top_n=top_n, min_score=min_score, max_gap=max_gap)
