"""The tokenizer: from (question, passage) pairs to token ids.

A template is cut at its special tokens, which are added by id; text that spells a special token stays text. The text
between two of them is tokenized as a whole, because its parts tokenized alone have other ids. If a pair is over the
limit, only tokens of the passage are dropped; the question and the rest of the template stay.

The work depends on the limit, not on the text. Of a passage far over the limit only the start and a short end are
tokenized. The start has `MARGIN` tokens more than are kept: a cut changes the tokenization of the last words before it
and nothing further away, because a tokenizer splits text into words from left to right and tokenizes each alone. A
word longer than the margin is safe too, since byte-pair merges depend on neighbouring tokens only.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import Unigram

from mistral_rerank.errors import CheckpointError, InputTooLongError
from mistral_rerank.templates import PLACEHOLDER, RenderedPair

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

    from mistral_rerank.reranker import Overflow, Pair
    from mistral_rerank.templates import Template, TemplateText

CHUNK_OVERLAP = 64
"""Passage tokens that neighbouring chunks share, so that a sentence cut in one chunk is whole in the next."""

SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|</?s>|<[be]os>|</?think>|\[(?:CLS|SEP)\]")
"""What looks like a special token in a template; a tokenizer without it is that of another model."""

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


@dataclass(frozen=True, slots=True)
class _Segment:
    """Text of a template that is tokenized as a whole: literals and placeholders in turn.

    Attributes:
        parts: literals and placeholders.
        special: id of the special token before it, or None.

    """

    parts: tuple[str, ...]
    special: int | None


@dataclass(frozen=True, slots=True)
class _Prompt:
    """The prompt of one question: everything but the passage.

    Attributes:
        start: ids before the text with the passage.
        head: text before the passage.
        tail: text after it.
        end: ids after that text.
        room: the most tokens of the text with the passage.
        special: id of the first token of that text, if a boundary stands for a special token there.

    """

    start: list[int]
    head: str
    tail: str
    end: list[int]
    room: int
    special: int | None

    def render(self, passage: str) -> RenderedPair:
        return RenderedPair(f"{self.head}{passage}{self.tail}", len(self.head), len(self.head) + len(passage))

    def ids(self, encoding: Encoding) -> list[int]:
        ids: list[int] = encoding.ids
        return ids if self.special is None else [self.special, *ids[1:]]


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
        tokenizer: PreTrainedTokenizerBase,
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
        if append_eos and tokenizer.eos_token_id is None:
            raise CheckpointError("rerank.json asks for an end token, and the tokenizer has none (eos_token)")
        self._template = template
        self._max_length = max_length
        self._first_cut = CHARACTERS * (max_length + MARGIN)
        self._overflow = overflow
        start, end = (
            _special_tokens_around(backend) if add_special_tokens and template.template is not None else ([], [])
        )
        if append_eos and end[-1:] != [tokenizer.eos_token_id]:
            end.append(int(tokenizer.eos_token_id))
        texts = [text for text in (template.template, template.instruction_template) if text is not None]
        literals = "".join(chain.from_iterable([text] if isinstance(text, str) else text for text in texts))
        special = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
        special = {content: number for content, number in special.items() if content in literals and content.strip()}
        if missing := [token for token in SPECIAL_TOKEN.findall(literals) if token not in special]:
            raise CheckpointError(f"the prompt template holds {missing[0]}, which is no token of the tokenizer")
        self._backend = _text_tokenizer(backend, special)
        self._boundary = f"\ue000{secrets.token_hex(8)}\ue001"  # stands for a special token; no text can contain it
        self._backend.add_tokens([AddedToken(self._boundary, normalized=False)])
        self._layouts: dict[TemplateText | None, list[list[int] | _Segment]] = {
            text: [start, *(_pair_layout(backend) if text is None else self._layout(text, special)), end]
            for text in {template.template, template.instruction_template or template.template}
        }

    def _layout(self, template: TemplateText, special: dict[str, int]) -> Iterator[list[int] | _Segment]:
        """Yield the ids of a template's special tokens and constant text, and its segments with placeholders."""
        spelled = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        for text in (template,) if isinstance(template, str) else template:
            before, position = None, 0
            for match in [*spelled.finditer(text), None]:
                literal = text[position : len(text) if match is None else match.start()]
                segment = _Segment(tuple(PLACEHOLDER.split(literal)), before)
                if len(segment.parts) > 1:
                    yield segment
                elif literal or before is not None:
                    yield self._ids(segment, {})
                if match is not None:
                    before, position = special[match[0]], match.end()

    def _ids(self, segment: _Segment, texts: dict[str, str]) -> list[int]:
        """Tokenize a segment without the passage."""
        text = self._boundary * (segment.special is not None) + "".join(texts.get(part, part) for part in segment.parts)
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids if segment.special is None else [segment.special, *ids[1:]]

    def _prompt(self, query: str, instruction: str | None) -> _Prompt:
        template, instruction = self._template.of(instruction)
        texts = {"{query}": _clean(query), "{instruction}": _clean(instruction)}
        start, end, segment = [], [], None
        for part in self._layouts[template]:
            if isinstance(part, _Segment) and "{passage}" in part.parts:
                segment = part
            else:
                ids = self._ids(part, texts) if isinstance(part, _Segment) else part
                (start if segment is None else end).extend(ids)
        assert segment is not None, "a template holds {passage}"  # noqa: S101
        parts, position = [texts.get(part, part) for part in segment.parts], segment.parts.index("{passage}")
        return _Prompt(
            start,
            self._boundary * (segment.special is not None) + "".join(parts[:position]),
            "".join(parts[position + 1 :]),
            end,
            self._max_length - len(start) - len(end),
            segment.special,
        )

    def encode(
        self,
        pairs: Sequence[Pair],
        overflow: Overflow | None = None,
        *,
        instruction: str | None = None,
        locate: bool = False,
    ) -> list[EncodedPair]:
        """Tokenize pairs, in input order.

        Args:
            pairs: questions with passages.
            overflow: what happens to longer pairs in this call; None for the tokenizer's default.
            instruction: of this call; None for the template's.
            locate: whether to find the passages' tokens.

        Raises:
            InvalidInputError: an instruction is given, and the template has no place for one.
            InputTooLongError: a question leaves no room for its passage, or `overflow` is "error" and a pair
                is over the limit. The message names the position and the counts.

        """
        return list(chain.from_iterable(self.slices(pairs, overflow, instruction=instruction, locate=locate)))

    def slices(
        self,
        pairs: Sequence[Pair],
        overflow: Overflow | None = None,
        *,
        instruction: str | None = None,
        locate: bool = False,
    ) -> Iterator[list[EncodedPair]]:
        """Tokenize like `encode` in steps of bounded work; a step yields some of the pairs, or none yet."""
        overflow = overflow or self._overflow
        prompts: dict[str, _Prompt] = {}
        batch: list[tuple[int, _Prompt, str]] = []
        size = 0
        for position, (query, passage) in enumerate(pairs):
            if query not in prompts:
                self._check_length(position, query, instruction or "")
                prompts[query] = self._prompt(query, instruction)
            prompt = prompts[query]
            if overflow == "chunk" and len(passage) > SECTION_CHARACTERS:
                yield self._encode(batch, overflow, locate=locate)
                batch, size = [], 0
                pieces = []
                for start in range(0, len(passage) - SECTION_OVERLAP, SECTION_CHARACTERS - SECTION_OVERLAP):
                    section = passage[start : start + SECTION_CHARACTERS]
                    pieces += self._encode([(position, prompt, section)], overflow, locate=True)
                    yield []
                yield [_join(pieces)]
                continue
            cut = len(passage) if overflow == "chunk" else self._first_cut + TAIL_CHARACTERS
            length = len(prompt.head) + len(prompt.tail) + min(len(passage), cut)
            if batch and size + length > SLICE_CHARACTERS:
                yield self._encode(batch, overflow, locate=locate)
                batch, size = [], 0
            batch.append((position, prompt, passage))
            size += length
        yield self._encode(batch, overflow, locate=locate)

    def _check_length(self, position: int, *texts: str) -> None:
        """Reject a question or an instruction far over the limit without tokenizing all of it."""
        for text in texts:
            cut = self._first_cut
            while cut < len(text):
                (encoding,) = self._backend.encode_batch_fast([_clean(text[:cut])], add_special_tokens=False)
                if len(encoding.ids) >= self._max_length + MARGIN:
                    raise InputTooLongError(
                        f"pair {position}: the question takes more than {self._max_length} tokens and leaves none for "
                        "the passage; shorten the question or the instruction, or raise max_length"
                    )
                cut *= 2

    def _encode(
        self, pairs: Sequence[tuple[int, _Prompt, str]], overflow: Overflow, *, locate: bool
    ) -> list[EncodedPair]:
        """Tokenize passages, given with their positions in the call and their prompts."""
        encoded: dict[int, EncodedPair] = {}
        rendered: list[tuple[int, _Prompt, RenderedPair]] = []
        longer: list[tuple[int, _Prompt, str]] = []
        for position, prompt, passage in pairs:
            if overflow != "chunk" and len(passage) > self._first_cut + TAIL_CHARACTERS:
                longer.append((position, prompt, passage))
            else:
                rendered.append((position, prompt, prompt.render(_clean(passage))))
        encode = self._backend.encode_batch if locate else self._backend.encode_batch_fast
        encodings = encode([text.text for _, _, text in rendered], add_special_tokens=False)
        over_limit = []
        for (position, prompt, text), encoding in zip(rendered, encodings, strict=True):
            if len(encoding) > prompt.room:
                over_limit.append((position, prompt, text, encoding))
            else:
                encoded[position] = _whole(prompt, text, encoding, locate=locate)
        if not locate:  # truncation needs the offsets that the fast call leaves out
            texts = [text.text for _, _, text, _ in over_limit]
            encodings = self._backend.encode_batch(texts, add_special_tokens=False)
            over_limit = [(*pair[:3], encoding) for pair, encoding in zip(over_limit, encodings, strict=True)]
        for position, prompt, text, encoding in over_limit:
            encoded[position] = self._fit(position, prompt, _Tokens.of(prompt, text, encoding), overflow)
        for position, prompt, passage in longer:
            encoded[position] = self._fit_cut(position, prompt, passage, overflow)
        return [encoded[position] for position, _, _ in pairs]

    def _fit_cut(self, position: int, prompt: _Prompt, passage: str, overflow: Overflow) -> EncodedPair:
        """Fit a passage far over the limit, from the start and the end of its text."""
        cut = self._first_cut
        while True:
            is_cut = cut + TAIL_CHARACTERS < len(passage)
            parts = [_clean(passage[:cut]), _clean(passage[-TAIL_CHARACTERS:])] if is_cut else [_clean(passage)]
            text = prompt.render("".join(parts))
            (encoding,) = self._backend.encode_batch([text.text], add_special_tokens=False)
            tokens = _Tokens.of(prompt, text, encoding)
            if not is_cut and len(encoding.ids) <= prompt.room:
                return _whole(prompt, text, encoding, locate=True)
            end = text.passage_start + len(parts[0])
            before_cut = sum(1 for _, stop in encoding.offsets[tokens.first : tokens.last] if stop <= end)
            if not is_cut or before_cut >= prompt.room + MARGIN:
                return self._fit(position, prompt, tokens, overflow, is_cut=is_cut)
            cut *= 2

    def _fit(
        self, position: int, prompt: _Prompt, tokens: _Tokens, overflow: Overflow, *, is_cut: bool = False
    ) -> EncodedPair:
        """Truncate, chunk or reject one pair over the limit."""
        before, passage, after = tokens.parts
        window = prompt.room - len(before) - len(after)
        if window < 1:
            raise InputTooLongError(
                f"pair {position}: the question takes {self._max_length - window} of at most {self._max_length} tokens "
                "and leaves none for the passage; shorten the question or raise max_length"
            )
        if overflow == "error":
            length = len(tokens.ids) + self._max_length - prompt.room
            raise InputTooLongError(
                f"Input length {'of at least ' if is_cut else ''}{length} exceeds maximum allowed token size "
                f"{self._max_length} (pair {position}); shorten the passage, or set overflow to 'truncate' or 'chunk'"
            )
        head, tail = prompt.start + before, after + prompt.end
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


def _whole(prompt: _Prompt, text: RenderedPair, encoding: Encoding, *, locate: bool) -> EncodedPair:
    """Return the ids of a pair within the limit."""
    first, last = _passage_tokens(encoding, text) if locate else (0, 0)
    passage = range(len(prompt.start) + first, len(prompt.start) + last) if locate else range(0)
    return EncodedPair((prompt.start + prompt.ids(encoding) + prompt.end,), (passage,))


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The ids of a pair's text; the passage is `ids[first:last]`."""

    ids: list[int]
    first: int
    last: int

    @classmethod
    def of(cls, prompt: _Prompt, text: RenderedPair, encoding: Encoding) -> _Tokens:
        return cls(prompt.ids(encoding), *_passage_tokens(encoding, text))

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


def _pair_layout(backend: Tokenizer) -> list[list[int] | _Segment]:
    """Return the layout of the tokenizer's own pairs, such as [CLS] question [SEP] passage [SEP].

    Raises:
        CheckpointError: the tokenizer puts nothing between the two texts.

    """
    encoding = backend.encode("a", "a", add_special_tokens=True)
    texts = [index for index, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
    second = next(index for index in texts if encoding.sequence_ids[index] == 1)
    last_of_first = max(index for index in texts if encoding.sequence_ids[index] == 0)
    between = encoding.ids[last_of_first + 1 : second]
    if not between:
        raise CheckpointError("the checkpoint's tokenizer puts nothing between two texts; give a template")
    query, passage = _Segment(("", "{query}", ""), None), _Segment(("", "{passage}", ""), None)
    return [encoding.ids[: texts[0]], query, between, passage, encoding.ids[texts[-1] + 1 :]]


def _text_tokenizer(backend: Tokenizer, special: dict[str, int]) -> Tokenizer:
    """Copy a tokenizer, so that no text becomes one of its special tokens or of those that a template holds."""
    content, added = backend.to_str(), backend.get_added_tokens_decoder().values()
    is_unigram = isinstance(backend.model, Unigram)
    if is_unigram or not all(token.special for token in added if token.content in special):
        settings = json.loads(content)
        for token in settings["added_tokens"]:
            token["special"] |= token["content"] in special
        if is_unigram:  # it would find special tokens in a text, since its vocabulary holds them
            names = {token.content for token in added if token.special}
            for piece in settings["model"]["vocab"]:
                piece[0] = f"\ue000{piece[0]}" if piece[0] in names else piece[0]
        content = json.dumps(settings)
    copy = Tokenizer.from_str(content)
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def _clean(text: str) -> str:
    """Replace lone surrogates, which tokenizers reject."""
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
