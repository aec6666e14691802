"""Removes keys and texts from an endpoint's message before an error shows it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

LONGEST = 600
"""Characters of a message that are used; an error shows fewer."""
SHORTEST = 4
"""Shorter secrets and texts are not removed, because any message may contain them."""
WINDOW = 16
"""A run of this many characters that also occurs in a text counts as quoted from it."""


def redact(message: str, *, secrets: Iterable[str], texts: Iterable[str]) -> str:
    """Give a message on one line, without secrets, parts of texts and control characters.

    Texts are searched for in plain form and as JSON strings, whole and in part.
    """
    line = _line(message[:LONGEST])
    for secret in secrets:
        if len(secret) >= SHORTEST:
            line = line.replace(secret, "**********")
    forms = {form for text in texts for form in _forms(text)}
    for form in forms:
        if len(form) < WINDOW:
            line = line.replace(form, "[text]")
    quoted = _quoted(line, "\n".join(form for form in forms if len(form) >= WINDOW))
    return "".join(
        "[text]" if hidden and (i == 0 or not quoted[i - 1]) else "" if hidden else line[i]
        for i, hidden in enumerate(quoted)
    )


def _quoted(line: str, texts: str) -> list[bool]:
    """Mark the characters of a line in runs of at least `WINDOW` characters that also occur in the texts."""
    quoted, half = [False] * len(line), WINDOW // 2
    for at in range(0, len(line) - half + 1, half):
        if line[at : at + half] in texts:  # every quoted run contains such a piece
            for start in range(max(0, at - half), at + 1):
                if len(run := line[start : start + WINDOW]) == WINDOW and run in texts:
                    quoted[start : start + WINDOW] = [True] * WINDOW
    return quoted


def _forms(text: str) -> set[str]:
    forms = {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
    return {line for form in forms if len(line := _line(form)) >= SHORTEST}


def _line(text: str) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
