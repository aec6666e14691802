"""The output folder of an evaluation, which a stopped run resumes from.

`<out>.partial` is renamed to `out` when it is complete:

    first_stage/<set>.trec    the candidates
    scores/<set>.jsonl        one line a query: logits, probabilities, labels, seconds
    reranked/<set>.trec       the candidates in their new order
    queries.jsonl             all measures of every query
    results.json              the figures
    timing.json               seconds, versions and machine; differs between equal runs
    report.html               figures and plots, for people
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mistral_rerank.data_files.atomic import check_resume_settings, complete_lines, open_append
from mistral_rerank.errors import InvalidInputError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from mistral_rerank.evaluation.run_files import Run

SETTINGS = "settings.json"


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores and labels of the candidates of one question, in first-stage order.

    Attributes:
        logits: (candidates,).
        probabilities: (candidates,).
        labels: (candidates,), 1 if judged relevant, else 0.
        seconds: time that the reranker took.

    """

    logits: tuple[float, ...]
    probabilities: tuple[float, ...]
    labels: tuple[int, ...]
    seconds: float


class Workspace:
    """Creates the partial folder of `out`, or opens it to resume.

    Args:
        out: the folder to write; it must not exist.
        settings: of the evaluation.

    Raises:
        SettingsError: `out` exists, or the partial folder has other settings.

    """

    def __init__(self, out: Path, settings: Mapping[str, object]) -> None:
        if out.exists():
            raise SettingsError(f"{out} exists; give another --out, or remove it")
        self.out, self.folder = out, out.with_name(f"{out.name}.partial")
        check_resume_settings(self.folder / SETTINGS, settings, holder=self.folder)
        for name in ("first_stage", "scores", "reranked"):
            (self.folder / name).mkdir(exist_ok=True)

    def candidates(self, name: str) -> Path:
        """Give the run file of a set's first stage."""
        return self.folder / "first_stage" / f"{name}.trec"

    def reranked(self, name: str) -> Path:
        """Give the run file of a set after reranking."""
        return self.folder / "reranked" / f"{name}.trec"

    def scores(self, name: str) -> Path:
        """Give the file of a set's scores."""
        return self.folder / "scores" / f"{name}.jsonl"

    @property
    def vectors(self) -> Path:
        """The folder of the embedding cache, which is not part of the result."""
        return self.folder / "vectors"

    def finish(self) -> None:
        """Remove what is not part of the result, and rename the folder to `out`."""
        shutil.rmtree(self.vectors, ignore_errors=True)
        (self.folder / SETTINGS).unlink()
        self.folder.replace(self.out)


def resume_scores(file: Path, run: Run) -> dict[str, Scored]:
    """Read the scores of a stopped run, and remove an incomplete last line.

    Raises:
        InvalidInputError: the scores belong to other candidates.

    """
    done = {}
    for query, line in zip(run, complete_lines(file), strict=False):
        record = json.loads(line)
        if (record["query"], record["passages"]) != (query, [passage for passage, _ in run[query]]):
            raise InvalidInputError(f"{file} holds scores of other candidates; remove {file.parent.parent}")
        columns = {name: tuple(record[name]) for name in ("logits", "probabilities", "labels")}
        done[query] = Scored(**columns, seconds=record["seconds"])
    return done


def append_scores(file: Path, run: Run, scored: Iterable[tuple[str, Scored]]) -> Iterator[tuple[str, Scored]]:
    """Write each question's scores as a line, then yield them."""
    with open_append(file) as lines:
        for query, scores in scored:
            record = {"query": query, "passages": [passage for passage, _ in run[query]], **asdict(scores)}
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            lines.flush()
            yield query, scores
