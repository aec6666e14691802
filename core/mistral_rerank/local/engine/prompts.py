"""Prompt layouts: a template cut at its special tokens, and the prompt of one question as ids and text.

Special tokens of a template are added by id. The text between two of them is tokenized as a whole, because its parts
tokenized alone have other ids. A text that spells a special token stays text.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import Unigram

from mistral_rerank.errors import CheckpointError
from mistral_rerank.templates import PLACEHOLDER, RenderedPair

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import Encoding

    from mistral_rerank.templates import Template, TemplateText

SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|</?s>|<[be]os>|</?think>|\[(?:CLS|SEP)\]")
"""What looks like a special token in a template; a tokenizer without it is that of another model."""


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
class Prompt:
    """The prompt of one question: everything but the passage.

    Attributes:
        start: ids before the text with the passage.
        head: text before the passage.
        tail: text after it.
        end: ids after that text.
        special: id of the first token of that text, if a boundary stands for a special token there.
        question: where the question begins, white space before it included: a number of ids of `start` or of `end`,
            or of characters of `head` or `tail`.

    """

    start: list[int]
    head: str
    tail: str
    end: list[int]
    special: int | None
    question: tuple[Literal["start", "head", "tail", "end"], int]

    def render(self, passage: str) -> RenderedPair:
        """Put a passage into the text."""
        return RenderedPair(f"{self.head}{passage}{self.tail}", len(self.head), len(self.head) + len(passage))

    def ids(self, encoding: Encoding) -> list[int]:
        """Return the ids of an encoded text."""
        ids: list[int] = encoding.ids
        return ids if self.special is None else [self.special, *ids[1:]]

    def question_token(self, text: RenderedPair, encoding: Encoding) -> int:
        """Return the first token of the question, as an index in the ids of an encoded text.

        It is negative for a question before the text, and at least the number of ids for one after it.
        """
        part, position = self.question
        if part == "start":
            return position - len(self.start)
        if part == "end":
            return len(encoding.ids) + position
        character = position + (text.passage_end if part == "tail" else 0)
        return next((token for token, (_, end) in enumerate(encoding.offsets) if end > character), len(encoding.ids))


class PromptLayout:
    """Makes the prompts of one template for one tokenizer.

    Args:
        backend: the checkpoint's tokenizer.
        template: the prompt template.
        add_special_tokens: whether the tokenizer's special tokens around a text are added.
        end_token: id that is appended, or None.

    Attributes:
        backend: a copy of the tokenizer for texts, which never become special tokens.

    Raises:
        CheckpointError: the template is for another tokenizer.

    """

    def __init__(
        self, backend: Tokenizer, template: Template, *, add_special_tokens: bool, end_token: int | None
    ) -> None:
        self._template = template
        start, end = (
            _special_tokens_around(backend) if add_special_tokens and template.template is not None else ([], [])
        )
        if end_token is not None and end[-1:] != [end_token]:
            end.append(end_token)
        texts = [text for text in (template.template, template.instruction_template) if text is not None]
        literals = "".join(chain.from_iterable([text] if isinstance(text, str) else text for text in texts))
        special = {
            token.content: number
            for number, token in backend.get_added_tokens_decoder().items()
            if token.content in literals and (token.special or SPECIAL_TOKEN.fullmatch(token.content))
        }  # other added tokens, such as words, are found in texts as well
        if missing := [token for token in SPECIAL_TOKEN.findall(literals) if token not in special]:
            raise CheckpointError(f"the prompt template holds {missing[0]}, which is no token of the tokenizer")
        self.backend = _text_tokenizer(backend, special)
        self._boundary = f"\ue000{secrets.token_hex(8)}\ue001"  # stands for a special token; no text can contain it
        self.backend.add_tokens([AddedToken(self._boundary, normalized=False)])
        self._layouts: dict[TemplateText | None, list[list[int] | _Segment]] = {
            text: [start, *(_pair_layout(backend) if text is None else self._layout(text, special)), end]
            for text in {template.template, template.instruction_template or template.template}
        }

    def prompt(self, query: str, instruction: str | None) -> Prompt:
        """Make the prompt of a question.

        Raises:
            InvalidInputError: an instruction is given, and the template has no place for one.

        """
        template, instruction = self._template.of(instruction)
        if self._template.strip:
            instruction = instruction.strip()
        texts = {"{query}": clean(query), "{instruction}": clean(instruction)}
        start: list[int] = []
        end: list[int] = []
        segment: _Segment | None = None
        question: tuple[Literal["start", "head", "tail", "end"], int] = "start", 0
        for part in self._layouts[template]:
            if isinstance(part, _Segment) and "{passage}" in part.parts:
                segment = part
            else:
                if isinstance(part, _Segment) and "{query}" in part.parts:
                    question = ("start", len(start)) if segment is None else ("end", len(end))
                ids = self._ids(part, texts) if isinstance(part, _Segment) else part
                (start if segment is None else end).extend(ids)
        assert segment is not None, "a template holds {passage}"  # noqa: S101
        parts, position = [texts.get(part, part) for part in segment.parts], segment.parts.index("{passage}")
        boundary = self._boundary * (segment.special is not None)
        if "{query}" in segment.parts:
            at = segment.parts.index("{query}")
            before = boundary + "".join(parts[:at]) if at < position else "".join(parts[position + 1 : at])
            question = "head" if at < position else "tail", len(before.rstrip())  # a space joins the first word or not
        head = boundary + "".join(parts[:position])
        return Prompt(start, head, "".join(parts[position + 1 :]), end, segment.special, question)

    def _layout(self, template: TemplateText, special: dict[str, int]) -> Iterator[list[int] | _Segment]:
        """Yield the ids of a template's special tokens and constant text, and its segments with placeholders."""
        spelled = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        for text in (template,) if isinstance(template, str) else template:
            before: int | None = None
            position = 0
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
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids if segment.special is None else [segment.special, *ids[1:]]


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


def clean(text: str) -> str:
    """Replace lone surrogates, which tokenizers reject."""
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
