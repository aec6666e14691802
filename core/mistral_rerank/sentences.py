"""Sentences of a text as offsets. A text is never changed, so the offsets hold in the original."""

from __future__ import annotations

import re
from itertools import pairwise

END = re.compile(
    r"(?<![\s.][A-Z])(?<!\b(?:[DM]r|Ms|St|No|vs))(?<!\bMrs)[.!?…]+[\"'”’»)\]]*(?=\s+[^a-z\s])|[。！？]+[”’」』）]*|\n\s*\n|\n(?=\s*[-*•\d])"
)
"""The end of a sentence: punctuation before a space and no small letter, and not after an initial or a title; the
punctuation of Chinese and Japanese; an empty line; a line before an item of a list."""

Span = tuple[int, int]
"""Start and end of a part of a text, in characters (Unicode code points)."""


def sentence_spans(text: str) -> list[Span]:
    """Return the sentences, without the spaces around them; none for a blank text."""
    cuts = [0, *(match.end() for match in END.finditer(text)), len(text)]
    spans = []
    for start, end in pairwise(cuts):
        sentence = text[start:end]
        if stripped := sentence.strip():
            first = end - len(sentence.lstrip())
            spans.append((first, first + len(stripped)))
    return spans


class SentencePairs:
    """The sentences of passages, as pairs with a question.

    Attributes:
        pairs: (question, sentence), without those of passages that have one sentence.

    """

    def __init__(self, query: str, passages: list[str]) -> None:
        self._spans = [sentence_spans(passage) for passage in passages]
        self.pairs = [
            (query, passage[start:end])
            for passage, spans in zip(passages, self._spans, strict=True)
            for start, end in spans
            if len(spans) > 1
        ]

    def best(self, logits: list[float]) -> list[Span | None]:
        """Return the sentence with the highest logit of each passage, the first of equal ones; None for a blank one."""
        remaining = iter(logits)
        best: list[Span | None] = []
        for spans in self._spans:
            if len(spans) < 2:
                best.append(spans[0] if spans else None)
                continue
            own = [next(remaining) for _ in spans]
            best.append(spans[own.index(max(own))])
        return best
