"""Prompt templates: how an instruction, a question and a passage become one text.

The placeholders are `{query}`, `{passage}` and, where the model takes one, `{instruction}`. Special tokens are written
as they are spelled in the tokenizer; only a template's text can become a special token, a user's text never does.
"""

import re
from dataclasses import dataclass, field

from mistral_rerank.errors import InvalidInputError, SettingsError

DEFAULT_TEMPLATE = "question:{query} \n \n passage:{passage}"
"""The format of NVIDIA's later rerankers (llama-nemotron-rerank-1b-v2 model card)."""

PLACEHOLDER = re.compile(r"(\{query\}|\{passage\}|\{instruction\})")

TemplateText = str | tuple[str, ...]
"""The text of a template; the strings of a tuple are tokenized one by one."""


@dataclass(frozen=True, slots=True)
class RenderedPair:
    """One pair as text; `text[passage_start:passage_end]` is the passage."""

    text: str
    passage_start: int
    passage_end: int


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt template with `{query}` and `{passage}` once each, in either order, and at most one `{instruction}`.

    Attributes:
        template: the text; None for the tokenizer's own format of a pair, as encoders use.
        instruction_template: replaces the text in calls with an instruction; None: instructions go into `template`.
        instruction: the instruction of a call without one.
        strip: whether white space around question, passage and instruction is removed.
        parts: of `template`: text and placeholders in turn, such as ("question:", "{query}", " ", "{passage}", "").

    Raises:
        SettingsError: a placeholder is missing or repeated.

    """

    template: TemplateText | None = DEFAULT_TEMPLATE
    instruction_template: TemplateText | None = None
    instruction: str | None = None
    strip: bool = False
    parts: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = _split(("{query}", "{passage}") if self.template is None else self.template)
        if "{instruction}" in parts and not self.instruction:
            raise SettingsError("the prompt template holds {instruction}; give its default as `instruction`")
        if self.instruction_template is not None and "{instruction}" not in _split(self.instruction_template):
            raise SettingsError("instruction_template holds no {instruction}")
        object.__setattr__(self, "parts", parts)

    @property
    def takes_instruction(self) -> bool:
        """Whether there is a place for an instruction."""
        return "{instruction}" in self.parts or self.instruction_template is not None

    @property
    def passage_first(self) -> bool:
        """Whether the passage comes before the question."""
        return self.parts.index("{passage}") < self.parts.index("{query}")

    def of(self, instruction: str | None) -> tuple[TemplateText | None, str]:
        """Return the template's text for calls with an instruction, and the instruction.

        Raises:
            InvalidInputError: there is no place for an instruction.

        """
        if instruction and not self.takes_instruction:
            raise InvalidInputError(
                "an instruction is given, and the model's prompt template has no place for one; leave it out, or put "
                "it into the question"
            )
        text = self.template
        if (instruction or self.instruction) and self.instruction_template is not None:
            text = self.instruction_template
        return text, instruction or self.instruction or ""

    def format(self, query: str, passage: str, instruction: str | None = None) -> RenderedPair:
        """Render a pair; braces in its texts are ordinary characters."""
        text, instruction = self.of(instruction)
        if self.strip:
            query, passage, instruction = query.strip(), passage.strip(), instruction.strip()
        texts = {"{query}": query, "{passage}": passage, "{instruction}": instruction}
        parts = [texts.get(part, part) for part in _split(("{query}", "{passage}") if text is None else text)]
        position = _split(text if text is not None else ("{query}", "{passage}")).index("{passage}")
        start = sum(map(len, parts[:position]))
        return RenderedPair("".join(parts), start, start + len(passage))


def _split(template: TemplateText) -> tuple[str, ...]:
    """Split a template into text and placeholders in turn."""
    text = template if isinstance(template, str) else "".join(template)
    parts = tuple(PLACEHOLDER.split(text))
    placeholders = parts[1::2]
    if not {"{query}", "{passage}"} <= set(placeholders) or len(set(placeholders)) < len(placeholders):
        raise SettingsError(f"the prompt template {text!r} must hold {{query}} and {{passage}} once each")
    return parts
