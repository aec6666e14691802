"""Keeps keys and texts out of what an endpoint says, before a message shows it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

LONGEST = 600
"""Characters of a message that are looked at; a message shows fewer."""
SHORTEST = 4
"""Secrets and texts of fewer characters are no secret, and would be found in any message."""
WINDOW = 16
"""So many characters in a row that also stand in a text are taken to be quoted from it."""


def redact(said: str, *, secrets: Iterable[str], texts: Iterable[str]) -> str:
    """Give what an endpoint said on one line, without secrets, parts of texts and control characters.

    A text is found as it is, and as JSON writes it, whole or in part.
    """
    line = _line(said[:LONGEST])
    for secret in secrets:
        if len(secret) >= SHORTEST:
            line = line.replace(secret, "**********")
    forms = {form for text in texts for form in _forms(text)}
    for form in forms:
        if len(form) < WINDOW:
            line = line.replace(form, "[text]")
    quoted = _quoted(line, "\n".join(form for form in forms if len(form) >= WINDOW))
    return "".join(
        "[text]" if hidden and (at == 0 or not quoted[at - 1]) else "" if hidden else line[at]
        for at, hidden in enumerate(quoted)
    )


def _quoted(line: str, texts: str) -> list[bool]:
    """Mark the characters of a line that are in a run of at least `WINDOW` that stands in the texts as well."""
    quoted, half = [False] * len(line), WINDOW // 2
    for at in range(0, len(line) - half + 1, half):
        if line[at : at + half] in texts:  # as some such piece of every quoted run is
            for start in range(max(0, at - half), at + 1):
                if len(found := line[start : start + WINDOW]) == WINDOW and found in texts:
                    quoted[start : start + WINDOW] = [True] * WINDOW
    return quoted


def _forms(text: str) -> set[str]:
    forms = {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
    return {line for form in forms if len(line := _line(form)) >= SHORTEST}


def _line(text: str) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
