"""`rank` and `score`: use a reranker."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mistral_rerank.cli.options import app, named, progress_bar, with_reranker_options
from mistral_rerank.files import Passage, read_passages, score_file, score_lines
from mistral_rerank.settings import open_reranker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.reranker import RankedPassage


@app.command()
@with_reranker_options
def rank(
    query: Annotated[str, typer.Argument(help="the question")],
    files: Annotated[list[Path] | None, typer.Argument(help="text or .jsonl files; none or - for stdin")] = None,
    top_n: Annotated[int | None, typer.Option(min=0, help="how many to show  [default: all]")] = None,
    min_score: Annotated[float | None, typer.Option(min=0, max=1, help="hide less probable passages")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON lines instead of a table")] = False,
    **reranker: Any,
) -> None:
    """Put the passages that answer a question first.

    A passage is a line of text, or a JSON object a line with "text" (and "title", if any).
    """
    passages = [passage for file in files or [Path("-")] for passage in _passages(file)]
    with open_reranker(**reranker) as opened:
        texts = [passage.text for passage in passages]
        ranking = opened.rank(query, texts, top_n=top_n, min_score=min_score)
    if as_json:
        for record in _records(passages, ranking):
            print(json.dumps(record, ensure_ascii=False))  # noqa: T201
    else:
        _print_table(ranking)


@app.command()
@with_reranker_options
def score(
    pairs: Annotated[Path, typer.Argument(help='JSON lines with "query" and "passage"; - for stdin')],
    out: Annotated[Path | None, typer.Option(help="write here, and go on from here when stopped")] = None,
    **reranker: Any,
) -> None:
    """Score pairs: the same JSON lines come out, with "logit" and "probability"."""
    name = "stdin" if pairs == Path("-") else str(pairs)
    with (
        open_reranker(**reranker) as opened,
        sys.stdin if pairs == Path("-") else _open(pairs) as lines,
    ):
        if out is None:
            for record in score_lines(opened, lines, name):
                print(json.dumps(record, ensure_ascii=False), flush=True)  # noqa: T201
            return
        total = None if lines is sys.stdin else sum(1 for line in lines if line.strip())
        if total is not None:
            lines.seek(0)
        with progress_bar() as progress:
            task = progress.add_task("pairs", total=total)
            score_file(
                opened, lines, name, out, settings=named(reranker), progress=lambda n: progress.advance(task, n)
            )


def _open(path: Path) -> Any:
    return path.open(encoding="utf-8")


def _passages(file: Path) -> list[Passage]:
    if file == Path("-"):
        return read_passages(sys.stdin, "stdin")
    with _open(file) as lines:
        return read_passages(lines, str(file))


def _records(passages: Sequence[Passage], ranking: list[RankedPassage]) -> list[dict[str, object]]:
    return [
        {"text": place.text}
        | passages[place.index].record
        | {"index": place.index, "logit": place.score.logit, "probability": place.score.probability}
        for place in ranking
    ]


def _print_table(ranking: list[RankedPassage]) -> None:
    table = Table("now", "was", "probability", "passage", box=None, pad_edge=False)
    for position, place in enumerate(ranking, start=1):
        text = " ".join(place.text.split())
        table.add_row(str(position), str(place.index + 1), f"{place.score.probability:.3f}", text)
    for column in table.columns[:3]:
        column.justify, column.min_width = "right", len(str(column.header))
    table.columns[3].overflow, table.columns[3].no_wrap = "ellipsis", True
    Console(highlight=False, markup=False).print(table)
