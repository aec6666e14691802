"""The settings of an evaluation and its output folder, which a stopped run resumes from.

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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pydantic import BaseModel, ConfigDict, Field

from mistral_rerank.data_files.atomic import check_resume_settings, complete_lines
from mistral_rerank.errors import InvalidInputError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mistral_rerank.evaluation.run_files import Run

VECTORS = "vectors"
"""The embedding cache in the partial folder."""


class EvaluationSettings(BaseModel):
    """Settings of an evaluation; `mistral-rerank evaluate` has an option for each of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: tuple[Path, ...] = Field(min_length=1, description="a BEIR folder; repeatable")
    first_stage: str = Field("bm25", description="bm25, dense:MODEL, hybrid:MODEL, or a path of TREC runs")
    top_k: int = Field(50, ge=1, description="candidates of a question that are reranked")
    queries: int | None = Field(None, ge=1, description="questions sampled from each data set; default: all")
    questions_at_once: int = Field(1, ge=1, description="questions whose candidates are scored in one call")
    split: str | None = Field(None, description="which qrels/SPLIT.tsv; default: the only one")
    query_prefix: str | None = Field(None, description="prefix of questions, instead of the embedding preset's")
    passage_prefix: str | None = Field(None, description="prefix of passages, instead of the embedding preset's")
    drop_same_id: bool = Field(False, description="drop candidates with the question's id (ArguAna, Quora)")
    fit_weight: Path | None = Field(
        None, description="results of an evaluation on other questions: fit retriever_weight there, and report it here"
    )
    seed: int = Field(0, description="seed of the sampling of questions")


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores and labels (1 if judged relevant, else 0) of the candidates of one question, in first-stage order."""

    logits: tuple[float, ...]
    probabilities: tuple[float, ...]
    labels: tuple[int, ...]
    seconds: float


@contextmanager
def partial_folder(out: Path, settings: Mapping[str, object]) -> Iterator[Path]:
    """Give `<out>.partial`, new or of a stopped run; at the end it becomes `out`.

    Args:
        out: the folder to write; it must not exist.
        settings: names and values that JSON preserves; a run resumes only with the same ones.

    Raises:
        SettingsError: `out` exists, or the partial folder has other settings.

    """
    if out.exists():
        raise SettingsError(f"{out} exists; give another --out, or remove it")
    folder = out.with_name(f"{out.name}.partial")
    check_resume_settings(folder / "settings.json", settings, holder=folder)
    for name in ("first_stage", "scores", "reranked"):
        (folder / name).mkdir(exist_ok=True)
    yield folder
    shutil.rmtree(folder / VECTORS, ignore_errors=True)
    (folder / "settings.json").unlink()
    folder.replace(out)


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


def append_scores(lines: TextIO, query: str, passages: Sequence[str], scored: Scored) -> None:
    """Write the scores of a question as one line."""
    record = {"query": query, "passages": passages, **asdict(scored)}
    lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    lines.flush()
