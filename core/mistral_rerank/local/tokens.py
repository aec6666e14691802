"""From (question, passage) pairs to token ids.

The whole text of a pair is tokenized at once, because the pieces tokenized apart give other ids. When it is
too long only tokens of the passage are left out: the question, what the template says after the passage and
the end token stay. Special tokens are added here by id; text that spells one stays text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from mistral_rerank.errors import CheckpointError, InputTooLongError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

    from mistral_rerank.prompts import Prompt, PromptText
    from mistral_rerank.reranker import Overflow, Pair

CHUNK_OVERLAP = 64
"""Passage tokens that neighbouring chunks share, so that no sentence is only ever seen cut in two."""


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """The token ids of one pair.

    Attributes:
        sequences: one, or several when its passage was chunked.
        passages: where in each of them the passage is; where that was not asked for, they may be empty.
        tokens_left_out: how many tokens of the passage are in none of them.

    """

    sequences: tuple[list[int], ...]
    passages: tuple[range, ...]
    tokens_left_out: int = 0


class PairTokenizer:
    """Turns pairs into ids for one checkpoint.

    Args:
        tokenizer: the checkpoint's own; it must be a fast one (a `tokenizer.json`).
        prompt: how the pair becomes text.
        append_eos: whether the sequence ends in the tokenizer's end token.
        max_length: the most tokens of a sequence, special tokens included.
        overflow: what happens to a longer one.

    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
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
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True

    def encode(
        self, pairs: Sequence[Pair], overflow: Overflow | None = None, *, locate: bool = False
    ) -> list[EncodedPair]:
        """Give the ids of every pair, in input order.

        Args:
            pairs: questions with passages.
            overflow: what happens to longer ones in this call; None for the tokenizer's own choice.
            locate: whether to say where the passages are.

        Raises:
            InputTooLongError: a question leaves no room for its passage, or `overflow` is "error" and a pair
                is over the limit. The message names the position and the counts.

        """
        texts = [self._prompt.format(_clean(query), _clean(passage)) for query, passage in pairs]
        encode = self._backend.encode_batch if locate else self._backend.encode_batch_fast
        encodings = encode([text.text for text in texts], add_special_tokens=False)
        room = self._max_length - len(self._start) - len(self._end)
        return [
            EncodedPair((self._start + encoding.ids + self._end,), (self._place(encoding, text, locate=locate),))
            if len(encoding.ids) <= room
            else self._fit(position, text, room, overflow or self._overflow)
            for position, (text, encoding) in enumerate(zip(texts, encodings, strict=True))
        ]

    def _place(self, encoding: Encoding, text: PromptText, *, locate: bool) -> range:
        """Say where the passage is among the ids of a pair that fits."""
        if not locate:
            return range(0)
        first, last = _passage_tokens(encoding, text)
        return range(len(self._start) + first, len(self._start) + last)

    def _fit(self, position: int, text: PromptText, room: int, overflow: Overflow) -> EncodedPair:
        """Bring one over-long pair under the limit."""
        encoding = self._backend.encode(text.text, add_special_tokens=False)
        ids, (first, last) = encoding.ids, _passage_tokens(encoding, text)
        before, passage, after = ids[:first], ids[first:last], ids[last:]
        window = room - len(before) - len(after)
        if window < 1:
            raise InputTooLongError(
                f"pair {position}: the question takes {len(before) + len(after)} of at most {room} tokens and "
                "leaves none for the passage; shorten the question or raise max_length"
            )
        if overflow == "error":
            raise InputTooLongError(
                f"Input length {len(ids) + self._max_length - room} exceeds maximum allowed token size "
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


def _passage_tokens(encoding: Encoding, text: PromptText) -> tuple[int, int]:
    """Give the first token of the passage, with which a space before it may be one, and the first behind it."""
    spans, begin = encoding.offsets, len(text.text[: text.passage_start].rstrip())
    first = next(
        (i for i, (start, end) in enumerate(spans) if start >= begin and end > text.passage_start), len(spans)
    )
    return first, next((i for i in range(first, len(spans)) if spans[i][1] > text.passage_end), len(spans))


def _special_tokens_around(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """Give the special tokens that this tokenizer puts before and after a text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _clean(text: str) -> str:
    """Replace lone surrogates, which no tokenizer takes."""
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
