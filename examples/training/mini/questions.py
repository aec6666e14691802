"""Groups of questions and passages, and questions that are rewritten or joined."""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import messy_questions

Row = list[float | None]
"""The grades of one question: 1 relevant, 0 irrelevant, None unknown."""


@dataclass(frozen=True, slots=True)
class Group:
    """Questions with the same passages.

    Attributes:
        queries: the questions.
        passages: the passages.
        grades: one row for each question, one column for each passage.
        teacher: the logits of the teachers, of the same shape; None without distillation.

    """

    queries: list[str]
    passages: list[str]
    grades: list[Row]
    teacher: list[list[float]] | None = None


def rewritten(name: str, question: str, draw: random.Random) -> str:
    """Rewrite some questions of a set as users type them."""
    if name == "medquad":
        return messy_questions.as_a_patient(question, draw)
    if name != "fever_eraser" and draw.random() < 0.3:
        return messy_questions.in_a_hurry(question, draw)
    return question


def joined(first: str, second: str, draw: random.Random) -> str:
    """Join two questions into one."""
    first, second = (text.strip().rstrip("?. ") for text in (first, second))
    if second.split()[0].lower() in messy_questions.NOT_NAMES:
        second = second[0].lower() + second[1:]
    return draw.choice((f"{first}, and {second}?", f"{first}? {second}?", f"{first} and {second}?"))


def both(first: Row, second: Row) -> Row:
    """Grade for a joined question: what answers one half is relevant; what may answer one half is unknown."""
    return [1.0 if 1.0 in pair else None if None in pair else 0.0 for pair in zip(first, second, strict=True)]
