"""Prompt templates: how a question and a passage become one text.

A rendered pair says where in the text the passage is. The tokenizer uses that to truncate the passage and nothing else.
"""

import re
from dataclasses import dataclass, field

from mistral_rerank.errors import SettingsError

DEFAULT_TEMPLATE = "question:{query} \n \n passage:{passage}"
"""The format of NVIDIA's later rerankers (llama-nemotron-rerank-1b-v2 model card)."""


@dataclass(frozen=True, slots=True)
class RenderedPair:
    """One pair as text; `text[passage_start:passage_end]` is the passage."""

    text: str
    passage_start: int
    passage_end: int


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt template with `{query}` and `{passage}` once each, in either order.

    Attributes:
        parts: text and placeholders in turn, such as ("question:", "{query}", " ", "{passage}", "").

    Raises:
        SettingsError: a placeholder is missing or repeated.

    """

    template: str = DEFAULT_TEMPLATE
    parts: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = tuple(re.split(r"(\{query\}|\{passage\})", self.template))
        if sorted(parts[1::2]) != ["{passage}", "{query}"]:
            raise SettingsError(f"the prompt template {self.template!r} must hold {{query}} and {{passage}} once each")
        object.__setattr__(self, "parts", parts)

    @property
    def passage_first(self) -> bool:
        """Whether the passage comes before the question."""
        return self.parts[1] == "{passage}"

    def format(self, query: str, passage: str) -> RenderedPair:
        """Render a pair; braces in its texts are ordinary characters."""
        before, _, between, _, after = self.parts
        if self.passage_first:
            return RenderedPair(f"{before}{passage}{between}{query}{after}", len(before), len(before) + len(passage))
        head = f"{before}{query}{between}"
        return RenderedPair(f"{head}{passage}{after}", len(head), len(head) + len(passage))
