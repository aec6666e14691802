"""The tokenizer: from (question, passage) pairs to token ids.

If a pair is over the limit, only tokens of the passage are dropped; the question and the rest of the template stay.

The work depends on the limit, not on the text. Of a passage far over the limit only the start and a short end are
tokenized. The start has `MARGIN` tokens more than are kept: a cut changes the tokenization of the last words before it
and nothing further away, because a tokenizer splits text into words from left to right and tokenizes each alone. A
word longer than the margin is safe too, since byte-pair merges depend on neighbouring tokens only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from mistral_rerank.errors import CheckpointError, InputTooLongError
from mistral_rerank.local.engine.prompts import PromptLayout, clean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

    from mistral_rerank.local.checkpoints.plain import PlainTokenizer
    from mistral_rerank.local.engine.prompts import Prompt
    from mistral_rerank.reranker import Overflow
    from mistral_rerank.scores import Pair
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
class Cut:
    """What is read of a long passage.

    Attributes:
        overflow: what happens to pairs over the limit; None for the tokenizer's default.
        tokens: most tokens of a passage; what is beyond is left out before `overflow` applies.
        chunks: most chunks of a passage.

    """

    overflow: Overflow | None
    tokens: int | None = None
    chunks: int | None = None

    @classmethod
    def of(cls, overflow: Overflow | Cut | None, *, default: Overflow, max_length: int) -> Cut:
        """Fill in the defaults; a limit of chunks asks for chunks, and implies one of tokens."""
        cut = overflow if isinstance(overflow, Cut) else cls(overflow)
        if cut.chunks is None:
            return replace(cut, overflow=cut.overflow or default)
        in_chunks = cut.chunks * max_length
        return cls("chunk", in_chunks if cut.tokens is None else min(in_chunks, cut.tokens), cut.chunks)

    @property
    def reads_all(self) -> bool:
        """Whether the whole passage is read, however long it is."""
        return self.overflow == "chunk" and self.tokens is None

    def within(self, room: int) -> int:
        """Return the most tokens that a passage may have without being cut, in a text of `room` tokens."""
        return room if self.tokens is None else min(room, self.tokens)


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """The token ids of one pair.

    Attributes:
        sequences: one, or several if its passage was chunked.
        passages: the passage's tokens in each sequence; empty ranges if they were not located.
        tokens_left_out: tokens of the passage in no sequence; an estimate if its text was cut before tokenizing.
        questions: the first token of the question in each sequence; empty if it was not located.

    """

    sequences: tuple[list[int], ...]
    passages: tuple[range, ...]
    tokens_left_out: int = 0
    questions: tuple[int, ...] = ()


class PairTokenizer:
    """Tokenizes pairs for one checkpoint.

    Args:
        tokenizer: the checkpoint's; it must be a fast one (a `tokenizer.json`).
        template: the prompt template.
        add_special_tokens: whether the tokenizer's special tokens around a text are added.
        append_eos: whether sequences end in the tokenizer's end token.
        max_length: the most tokens of a sequence, special tokens included.
        overflow: what happens to longer pairs.

    Raises:
        CheckpointError: the tokenizer is no fast one, or has no end token.

    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | PlainTokenizer,
        template: Template,
        *,
        add_special_tokens: bool = True,
        append_eos: bool = True,
        max_length: int,
        overflow: Overflow = "truncate",
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise CheckpointError("the checkpoint has no tokenizer.json; convert its tokenizer to a fast one")
        end_token = tokenizer.eos_token_id if append_eos else None
        if append_eos and end_token is None:
            raise CheckpointError("rerank.json asks for an end token, and the tokenizer has none (eos_token)")
        self._max_length = max_length
        self._first_cut = CHARACTERS * (max_length + MARGIN)
        self._overflow, self._strip = overflow, template.strip
        self._layout = PromptLayout(
            backend,
            template,
            add_special_tokens=add_special_tokens,
            end_token=None if end_token is None else int(end_token),
        )
        self._backend = self._layout.backend

    def encode(
        self,
        pairs: Sequence[Pair],
        overflow: Overflow | Cut | None = None,
        *,
        instruction: str | None = None,
        locate: bool = False,
    ) -> list[EncodedPair]:
        """Tokenize pairs, in input order.

        Args:
            pairs: questions with passages.
            overflow: what happens to longer pairs in this call, or also what is read of passages; None for the
                tokenizer's default.
            instruction: of this call; None for the template's.
            locate: whether to find the passages' tokens and the questions'.

        Raises:
            InvalidInputError: an instruction is given, and the template has no place for one.
            InputTooLongError: a question leaves no room for its passage, or `overflow` is "error" and a pair
                is over the limit. The message names the position and the counts.

        """
        return list(chain.from_iterable(self.slices(pairs, overflow, instruction=instruction, locate=locate)))

    def slices(
        self,
        pairs: Sequence[Pair],
        overflow: Overflow | Cut | None = None,
        *,
        instruction: str | None = None,
        locate: bool = False,
    ) -> Iterator[list[EncodedPair]]:
        """Tokenize like `encode` in steps of bounded work; a step yields some of the pairs, or none yet."""
        rule = Cut.of(overflow, default=self._overflow, max_length=self._max_length)
        prompts: dict[str, Prompt] = {}
        batch: list[tuple[int, Prompt, str]] = []
        size = 0
        for position, (query, passage) in enumerate(pairs):
            if self._strip:
                query, passage = query.strip(), passage.strip()
            if query not in prompts:
                self._check_length(position, query, instruction or "")
                prompts[query] = self._layout.prompt(query, instruction)
            prompt = prompts[query]
            if rule.reads_all and len(passage) > SECTION_CHARACTERS:
                yield self._encode(batch, rule, locate=locate)
                batch, size = [], 0
                pieces = []
                for start in range(0, len(passage) - SECTION_OVERLAP, SECTION_CHARACTERS - SECTION_OVERLAP):
                    section = passage[start : start + SECTION_CHARACTERS]
                    pieces += self._encode([(position, prompt, section)], rule, locate=True)
                    yield []
                yield [_join(pieces)]
                continue
            cut = len(passage) if rule.reads_all else self._first_cut + TAIL_CHARACTERS
            length = len(prompt.head) + len(prompt.tail) + min(len(passage), cut)
            if batch and size + length > SLICE_CHARACTERS:
                yield self._encode(batch, rule, locate=locate)
                batch, size = [], 0
            batch.append((position, prompt, passage))
            size += length
        yield self._encode(batch, rule, locate=locate)

    def _room(self, prompt: Prompt) -> int:
        """Return the most tokens of the text with the passage."""
        return self._max_length - len(prompt.start) - len(prompt.end)

    def _check_length(self, position: int, *texts: str) -> None:
        """Reject a question or an instruction far over the limit without tokenizing all of it."""
        for text in texts:
            cut = self._first_cut
            while cut < len(text):
                (encoding,) = self._backend.encode_batch_fast([clean(text[:cut])], add_special_tokens=False)
                if len(encoding.ids) >= self._max_length + MARGIN:
                    raise InputTooLongError(
                        f"pair {position}: the question takes more than {self._max_length} tokens and leaves none for "
                        "the passage; shorten the question or the instruction, or raise max_length"
                    )
                cut *= 2

    def _encode(self, pairs: Sequence[tuple[int, Prompt, str]], rule: Cut, *, locate: bool) -> list[EncodedPair]:
        """Tokenize passages, given with their positions in the call and their prompts."""
        encoded: dict[int, EncodedPair] = {}
        rendered: list[tuple[int, Prompt, RenderedPair]] = []
        longer: list[tuple[int, Prompt, str]] = []
        for position, prompt, passage in pairs:
            if not rule.reads_all and len(passage) > self._first_cut + TAIL_CHARACTERS:
                longer.append((position, prompt, passage))
            else:
                rendered.append((position, prompt, prompt.render(clean(passage))))
        encode = self._backend.encode_batch if locate else self._backend.encode_batch_fast
        encodings = encode([text.text for _, _, text in rendered], add_special_tokens=False)
        over_limit = []
        for (position, prompt, text), encoding in zip(rendered, encodings, strict=True):
            if len(encoding) > rule.within(self._room(prompt)):
                over_limit.append((position, prompt, text, encoding))
            else:
                encoded[position] = _whole(prompt, text, encoding, locate=locate)
        if not locate:  # truncation needs the offsets that the fast call leaves out
            texts = [text.text for _, _, text, _ in over_limit]
            encodings = self._backend.encode_batch(texts, add_special_tokens=False)
            over_limit = [(*pair[:3], encoding) for pair, encoding in zip(over_limit, encodings, strict=True)]
        for position, prompt, text, encoding in over_limit:
            encoded[position] = self._fit(position, prompt, _Tokens.of(prompt, text, encoding), rule)
        for position, prompt, passage in longer:
            encoded[position] = self._fit_cut(position, prompt, passage, rule)
        return [encoded[position] for position, _, _ in pairs]

    def _fit_cut(self, position: int, prompt: Prompt, passage: str, rule: Cut) -> EncodedPair:
        """Fit a passage far over the limit, from the start and the end of its text."""
        cut = self._first_cut
        while True:
            is_cut = cut + TAIL_CHARACTERS < len(passage)
            parts = [clean(passage[:cut]), clean(passage[-TAIL_CHARACTERS:])] if is_cut else [clean(passage)]
            text = prompt.render("".join(parts))
            (encoding,) = self._backend.encode_batch([text.text], add_special_tokens=False)
            tokens = _Tokens.of(prompt, text, encoding)
            room = self._room(prompt)
            needed = rule.tokens if rule.overflow == "chunk" and rule.tokens is not None else rule.within(room)
            if not is_cut and len(encoding.ids) <= rule.within(room):
                return _whole(prompt, text, encoding, locate=True)
            end = text.passage_start + len(parts[0])
            before_cut = sum(1 for _, stop in encoding.offsets[tokens.first : tokens.last] if stop <= end)
            if not is_cut or before_cut >= needed + MARGIN:
                unread = len(passage) - sum(map(len, parts)) if is_cut else 0
                density = (tokens.last - tokens.first) / sum(map(len, parts))
                return self._fit(position, prompt, tokens, rule, beyond=math.ceil(unread * density))
            cut *= 2

    def _fit(self, position: int, prompt: Prompt, tokens: _Tokens, rule: Cut, *, beyond: int = 0) -> EncodedPair:
        """Truncate, chunk or reject one pair over the limit, whose passage has about `beyond` tokens more."""
        before, passage, after = tokens.parts
        window = self._room(prompt) - len(before) - len(after)
        if window < 1:
            raise InputTooLongError(
                f"pair {position}: the question takes {self._max_length - window} of at most {self._max_length} tokens "
                "and leaves none for the passage; shorten the question or raise max_length"
            )
        kept = passage[: rule.tokens]
        if rule.overflow == "error" and len(kept) > window:
            length = len(tokens.ids) + self._max_length - self._room(prompt)
            raise InputTooLongError(
                f"Input length {'of at least ' if beyond else ''}{length} exceeds maximum allowed token size "
                f"{self._max_length} (pair {position}); shorten the passage, or set overflow to 'truncate' or 'chunk'"
            )
        head, tail = prompt.start + before, after + prompt.end
        question = tokens.question
        if rule.overflow == "chunk":
            step = window - min(CHUNK_OVERLAP, window // 4)
            starts = range(0, max(1, len(kept) - window + step), step)[: rule.chunks]
        else:
            starts = range(1)
        pieces = [kept[start : start + window] for start in starts]
        left_out = len(passage) - min(len(kept), starts[-1] + window) + beyond
        return EncodedPair(
            tuple(head + piece + tail for piece in pieces),
            tuple(range(len(head), len(head) + len(piece)) for piece in pieces),
            left_out,
            tuple(
                len(prompt.start) + question - (len(passage) - len(piece) if question >= tokens.last else 0)
                for piece in pieces
            ),
        )


def _whole(prompt: Prompt, text: RenderedPair, encoding: Encoding, *, locate: bool) -> EncodedPair:
    """Return the ids of a pair within the limit."""
    first, last = _passage_tokens(encoding, text) if locate else (0, 0)
    passage = range(len(prompt.start) + first, len(prompt.start) + last) if locate else range(0)
    questions = (len(prompt.start) + prompt.question_token(text, encoding),) if locate else ()
    return EncodedPair((prompt.start + prompt.ids(encoding) + prompt.end,), (passage,), questions=questions)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The ids of a pair's text; the passage is `ids[first:last]`, and the question begins at `question`."""

    ids: list[int]
    first: int
    last: int
    question: int

    @classmethod
    def of(cls, prompt: Prompt, text: RenderedPair, encoding: Encoding) -> _Tokens:
        return cls(prompt.ids(encoding), *_passage_tokens(encoding, text), prompt.question_token(text, encoding))

    @property
    def parts(self) -> tuple[list[int], list[int], list[int]]:
        """The ids before the passage, of the passage, and after it."""
        return self.ids[: self.first], self.ids[self.first : self.last], self.ids[self.last :]


def _join(pieces: Sequence[EncodedPair]) -> EncodedPair:
    """Join the sections of one passage."""
    return EncodedPair(
        tuple(chain.from_iterable(piece.sequences for piece in pieces)),
        tuple(chain.from_iterable(piece.passages for piece in pieces)),
        questions=tuple(chain.from_iterable(piece.questions for piece in pieces)),
    )


def _passage_tokens(encoding: Encoding, text: RenderedPair) -> tuple[int, int]:
    """Return the first token of the passage and the first after it; the first may include a space before it."""
    spans, begin = encoding.offsets, len(text.text[: text.passage_start].rstrip())
    first = next((i for i, (start, end) in enumerate(spans) if start >= begin and end > text.passage_start), len(spans))
    return first, next((i for i in range(first, len(spans)) if spans[i][1] > text.passage_end), len(spans))
