"""Training examples: questions and passages, with grades and teacher logits of every pair."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pydantic import ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from mistral_rerank.data_files.atomic import atomic_write
from mistral_rerank.data_files.text import text_lines
from mistral_rerank.errors import InvalidInputError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Group:
    """Questions that are all compared with the same passages; most often there is one question.

    Attributes:
        queries: the questions.
        passages: the passages.
        grades: (queries, passages): 1 for a relevant passage, 0 for an irrelevant one, between them for a partly
            relevant one; None for an unjudged one, which counts only in the distillation.
        teacher: (queries, passages): logits of another model, whose softmax over the passages is the target of the
            distillation.

    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    queries: tuple[str, ...]
    passages: tuple[str, ...]
    grades: tuple[tuple[float | None, ...], ...]
    teacher: tuple[tuple[FiniteFloat, ...], ...] | None = None


_GROUP_LINE = TypeAdapter(Group)


def read_groups(file: Path) -> list[Group]:
    """Read groups from JSON lines with the fields of `Group`.

    Raises:
        InvalidInputError: a line is not of that format; it names the file and line.

    """
    groups = []
    for number, line in enumerate(text_lines(file), start=1):
        if not line.strip():
            continue
        try:
            groups.append(_GROUP_LINE.validate_json(line))
        except ValidationError as error:
            raise InvalidInputError(f"{file}, line {number}: {error.errors()[0]['msg']}") from error
        if problem := _problem(groups[-1]):
            raise InvalidInputError(f"{file}, line {number}: {problem}")
    return groups


def _problem(group: Group) -> str | None:
    if not group.queries or len(group.passages) < 2:
        return "a group needs a question and two passages"
    for name, rows in (("grades", group.grades), ("teacher", group.teacher)):
        if rows is not None and [len(row) for row in rows] != [len(group.passages)] * len(group.queries):
            return f"{name} must hold one row a question and one number a passage in it"
    for row in group.grades:
        known = [grade for grade in row if grade is not None]
        if not all(0 <= grade <= 1 for grade in known) or not any(known):
            return "grades lie between 0 and 1, and every question needs a passage above 0"
    return None


def check_free(out: Path) -> None:
    """Check that a file can be written, before its content is computed.

    Raises:
        SettingsError: it exists, or its folder does not.

    """
    if out.exists():
        raise SettingsError(f"{out} exists; give another file, or remove it")
    if not out.parent.is_dir():
        raise SettingsError(f"{out.parent} is no folder; make it first")


def write_groups(groups: Iterable[Group], out: Path) -> None:
    """Write groups as JSON lines, whole or not at all.

    Raises:
        SettingsError: `out` exists, or its folder does not.

    """
    check_free(out)
    with atomic_write(out) as lines:
        for group in groups:
            lines.write(json.dumps(asdict(group), ensure_ascii=False) + "\n")
