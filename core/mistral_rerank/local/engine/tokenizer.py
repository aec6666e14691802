"""The tokenizer: from (question, passage) pairs to token ids.

The text of a pair is tokenized as a whole, because its parts tokenized alone have other ids. If it is over the limit,
only tokens of the passage are dropped; the question, the rest of the template and the end token stay. Special tokens
are added by id, and text that spells a special token stays text.

The work depends on the limit, not on the text. Of a passage far over the limit only the start and a short end are
tokenized. The start has `MARGIN` tokens more than are kept: a cut changes the tokenization of the last words before it
and nothing further away, because a tokenizer splits text into words from left to right and tokenizes each alone. A
word longer than the margin is safe too, since byte-pair merges depend on neighbouring tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from mistral_rerank.errors import CheckpointError, InputTooLongError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

    from mistral_rerank.reranker import Overflow, Pair
    from mistral_rerank.templates import RenderedPair, Template

CHUNK_OVERLAP = 64
"""Passage tokens that neighbouring chunks share, so that a sentence cut in one chunk is whole in the next."""

MARGIN = 256
"""Tokens computed over the limit, so that those within it do not depend on where the text is cut."""

CHARACTERS = 8
"""Characters of a token, for the first cut. If tokens are longer, the next cut is twice as long."""

TAIL_CHARACTERS = 1024
"""The end of a cut passage that is tokenized too: its last word may join what follows in the template."""

SECTION_CHARACTERS = 131_072
"""A longer passage is chunked in sections of this length, each tokenized alone."""

SECTION_OVERLAP = 512
"""Characters that neighbouring sections share."""

SLICE_CHARACTERS = 65_536
"""Characters that are tokenized in one step, before another call's turn."""


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """The token ids of one pair.

    Attributes:
        sequences: one, or several if its passage was chunked.
        passages: the passage's tokens in each sequence; empty ranges if they were not located.
        tokens_left_out: tokens of the passage in no sequence; a lower bound if its text was cut before tokenizing.

    """

    sequences: tuple[list[int], ...]
    passages: tuple[range, ...]
    tokens_left_out: int = 0


class PairTokenizer:
    """Tokenizes pairs for one checkpoint.

    Args:
        tokenizer: the checkpoint's; it must be a fast one (a `tokenizer.json`).
        prompt: the prompt template.
        append_eos: whether sequences end in the tokenizer's end token.
        max_length: the most tokens of a sequence, special tokens included.
        overflow: what happens to longer pairs.

    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Template,
        *,
        append_eos: bool = True,
        max_length: int,
        overflow: Overflow = "truncate",
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise CheckpointError("the checkpoint has no tokenizer.json; convert its tokenizer to a fast one")
        if append_eos and tokenizer.eos_token_id is None:
            raise CheckpointError("rerank.json asks for an end token, and the tokenizer has none (eos_token)")
        self._prompt = prompt
        self._max_length = max_length
        self._overflow = overflow
        self._start, self._end = _special_tokens_around(backend)
        if append_eos and self._end[-1:] != [tokenizer.eos_token_id]:
            self._end.append(int(tokenizer.eos_token_id))
        self._room = max_length - len(self._start) - len(self._end)  # tokens of a pair without special tokens
        self._first_cut = CHARACTERS * (max(self._room, 0) + MARGIN)
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True

    def encode(
        self, pairs: Sequence[Pair], overflow: Overflow | None = None, *, locate: bool = False
    ) -> list[EncodedPair]:
        """Tokenize pairs, in input order.

        Args:
            pairs: questions with passages.
            overflow: what happens to longer pairs in this call; None for the tokenizer's default.
            locate: whether to find the passages' tokens.

        Raises:
            InputTooLongError: a question leaves no room for its passage, or `overflow` is "error" and a pair
                is over the limit. The message names the position and the counts.

        """
        return list(chain.from_iterable(self.slices(pairs, overflow, locate=locate)))

    def slices(
        self, pairs: Sequence[Pair], overflow: Overflow | None = None, *, locate: bool = False
    ) -> Iterator[list[EncodedPair]]:
        """Tokenize like `encode` in steps of bounded work; a step yields some of the pairs, or none yet."""
        overflow = overflow or self._overflow
        batch: list[tuple[int, Pair]] = []
        size = 0
        for position, (query, passage) in enumerate(pairs):
            if len(query) > self._first_cut:
                self._check_length(position, query)
            if overflow == "chunk" and len(passage) > SECTION_CHARACTERS:
                yield self._encode(batch, overflow, locate=locate)
                batch, size = [], 0
                pieces = []
                for start in range(0, len(passage) - SECTION_OVERLAP, SECTION_CHARACTERS - SECTION_OVERLAP):
                    section = passage[start : start + SECTION_CHARACTERS]
                    pieces += self._encode([(position, (query, section))], overflow, locate=True)
                    yield []
                yield [_join(pieces)]
                continue
            cut = len(passage) if overflow == "chunk" else self._first_cut + TAIL_CHARACTERS
            length = len(query) + min(len(passage), cut)
            if batch and size + length > SLICE_CHARACTERS:
                yield self._encode(batch, overflow, locate=locate)
                batch, size = [], 0
            batch.append((position, (query, passage)))
            size += length
        yield self._encode(batch, overflow, locate=locate)

    def _check_length(self, position: int, query: str) -> None:
        """Reject a question far over the limit without tokenizing all of it."""
        cut = self._first_cut
        while cut < len(query):
            (encoding,) = self._backend.encode_batch_fast([_clean(query[:cut])], add_special_tokens=False)
            if len(encoding.ids) >= self._room + MARGIN:
                raise InputTooLongError(
                    f"pair {position}: the question takes more than {self._room} tokens and leaves none for the "
                    "passage; shorten the question or raise max_length"
                )
            cut *= 2

    def _encode(self, pairs: Sequence[tuple[int, Pair]], overflow: Overflow, *, locate: bool) -> list[EncodedPair]:
        """Tokenize pairs, given with their positions in the call."""
        encoded: dict[int, EncodedPair] = {}
        rendered: list[tuple[int, RenderedPair]] = []
        longer: list[tuple[int, Pair]] = []
        for position, (query, passage) in pairs:
            if overflow != "chunk" and len(passage) > self._first_cut + TAIL_CHARACTERS:
                longer.append((position, (query, passage)))
            else:
                rendered.append((position, self._prompt.format(_clean(query), _clean(passage))))
        encode = self._backend.encode_batch if locate else self._backend.encode_batch_fast
        encodings = encode([text.text for _, text in rendered], add_special_tokens=False)
        over_limit = []
        for (position, text), encoding in zip(rendered, encodings, strict=True):
            if len(encoding.ids) > self._room:
                over_limit.append((position, text))
            else:
                ids = self._start + encoding.ids + self._end
                encoded[position] = EncodedPair((ids,), (self._locate(encoding, text) if locate else range(0),))
        if not locate:  # truncation needs the offsets that the fast call leaves out
            encodings = self._backend.encode_batch([text.text for _, text in over_limit], add_special_tokens=False)
        else:
            encodings = [encoding for encoding in encodings if len(encoding.ids) > self._room]
        for (position, text), encoding in zip(over_limit, encodings, strict=True):
            encoded[position] = self._fit(position, _Tokens.of(encoding, text), overflow)
        for position, pair in longer:
            encoded[position] = self._fit_cut(position, pair, overflow)
        return [encoded[position] for position, _ in pairs]

    def _locate(self, encoding: Encoding, text: RenderedPair) -> range:
        """Return the passage's tokens of a pair within the limit."""
        first, last = _passage_tokens(encoding, text)
        return range(len(self._start) + first, len(self._start) + last)

    def _fit_cut(self, position: int, pair: Pair, overflow: Overflow) -> EncodedPair:
        """Fit a pair whose passage is far over the limit, from the start and the end of its text."""
        query, passage = pair
        cut = self._first_cut
        while True:
            is_cut = cut + TAIL_CHARACTERS < len(passage)
            parts = [_clean(passage[:cut]), _clean(passage[-TAIL_CHARACTERS:])] if is_cut else [_clean(passage)]
            text = self._prompt.format(_clean(query), "".join(parts))
            (encoding,) = self._backend.encode_batch([text.text], add_special_tokens=False)
            tokens = _Tokens.of(encoding, text)
            if not is_cut and len(encoding.ids) <= self._room:
                return EncodedPair((self._start + encoding.ids + self._end,), (self._locate(encoding, text),))
            end = text.passage_start + len(parts[0])
            before_cut = sum(1 for _, stop in encoding.offsets[tokens.first : tokens.last] if stop <= end)
            if not is_cut or before_cut >= self._room + MARGIN:
                return self._fit(position, tokens, overflow, is_cut=is_cut)
            cut *= 2

    def _fit(self, position: int, tokens: _Tokens, overflow: Overflow, *, is_cut: bool = False) -> EncodedPair:
        """Truncate, chunk or reject one pair over the limit."""
        room = self._room
        before, passage, after = tokens.parts
        window = room - len(before) - len(after)
        if window < 1:
            raise InputTooLongError(
                f"pair {position}: the question takes {len(before) + len(after)} of at most {room} tokens and "
                "leaves none for the passage; shorten the question or raise max_length"
            )
        if overflow == "error":
            length = len(tokens.ids) + self._max_length - room
            raise InputTooLongError(
                f"Input length {'of at least ' if is_cut else ''}{length} exceeds maximum allowed token size "
                f"{self._max_length} (pair {position}); shorten the passage, or set overflow to 'truncate' or 'chunk'"
            )
        head, tail = self._start + before, after + self._end
        if overflow == "truncate":
            pieces, left_out = [passage[:window]], len(passage) - window
        else:
            step = window - min(CHUNK_OVERLAP, window // 4)
            starts = range(0, max(1, len(passage) - window + step), step)
            pieces, left_out = [passage[start : start + window] for start in starts], 0
        return EncodedPair(
            tuple(head + piece + tail for piece in pieces),
            tuple(range(len(head), len(head) + len(piece)) for piece in pieces),
            left_out,
        )


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The ids of a pair's text; the passage is `ids[first:last]`."""

    ids: list[int]
    first: int
    last: int

    @classmethod
    def of(cls, encoding: Encoding, text: RenderedPair) -> _Tokens:
        return cls(encoding.ids, *_passage_tokens(encoding, text))

    @property
    def parts(self) -> tuple[list[int], list[int], list[int]]:
        """The ids before the passage, of the passage, and after it."""
        return self.ids[: self.first], self.ids[self.first : self.last], self.ids[self.last :]


def _join(pieces: Sequence[EncodedPair]) -> EncodedPair:
    """Join the sections of one passage."""
    return EncodedPair(
        tuple(chain.from_iterable(piece.sequences for piece in pieces)),
        tuple(chain.from_iterable(piece.passages for piece in pieces)),
    )


def _passage_tokens(encoding: Encoding, text: RenderedPair) -> tuple[int, int]:
    """Return the first token of the passage and the first after it; the first may include a space before it."""
    spans, begin = encoding.offsets, len(text.text[: text.passage_start].rstrip())
    first = next((i for i, (start, end) in enumerate(spans) if start >= begin and end > text.passage_start), len(spans))
    return first, next((i for i in range(first, len(spans)) if spans[i][1] > text.passage_end), len(spans))


def _special_tokens_around(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer adds before and after a text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _clean(text: str) -> str:
    """Replace lone surrogates, which tokenizers reject."""
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
