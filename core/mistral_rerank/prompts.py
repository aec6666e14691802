"""How a question and a passage become the one text that the model reads.

A prompt knows where the passage lies in that text, and nothing of tokens: `local.tokens` uses the span to
cut an over-long passage without touching anything else.
"""

from dataclasses import dataclass, field

from mistral_rerank.errors import SettingsError

DEFAULT_TEMPLATE = "question:{query} \n \n passage:{passage}"
"""The format that NVIDIA documents for its later rerankers (llama-nemotron-rerank-1b-v2 model card)."""


@dataclass(frozen=True, slots=True)
class PromptText:
    """One pair as text; `text[passage_start:passage_end]` is the passage."""

    text: str
    passage_start: int
    passage_end: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A template with `{query}` and `{passage}` once each, in this order.

    Raises:
        SettingsError: a placeholder is missing, repeated or in the wrong order.

    """

    template: str = DEFAULT_TEMPLATE
    _parts: tuple[str, str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        before, found_query, rest = self.template.partition("{query}")
        between, found_passage, after = rest.partition("{passage}")
        outside = before + between + after
        if not (found_query and found_passage) or "{query}" in outside or "{passage}" in outside:
            raise SettingsError(
                f"the prompt template {self.template!r} must hold {{query}} once and, after it, {{passage}} once"
            )
        object.__setattr__(self, "_parts", (before, between, after))

    def format(self, query: str, passage: str) -> PromptText:
        """Fill the template; braces inside the texts are ordinary characters."""
        before, between, after = self._parts
        head = f"{before}{query}{between}"
        return PromptText(f"{head}{passage}{after}", len(head), len(head) + len(passage))
