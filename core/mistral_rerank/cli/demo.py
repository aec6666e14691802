"""`demo`: rerank passages that come with the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mistral_rerank.cli.options import app, with_reranker
from mistral_rerank.cli.terminal import Terminal
from mistral_rerank.demo import demo_questions
from mistral_rerank.settings import open_reranker

if TYPE_CHECKING:
    from mistral_rerank.reranker import Reranker
    from mistral_rerank.sentences import Span

ROWS = 3
"""Passages of each question that are printed."""
OTHER_COLUMNS = 24
"""Characters of a row, without the titles."""
MARK = "#000000 on #ffd75f"


@app.command()
@with_reranker
def demo(reranker: dict[str, Any]) -> None:
    """Rerank passages that come with the package, and show the order before and after."""
    with open_reranker(**reranker) as opened:
        print_demo(opened, Terminal())


def print_demo(reranker: Reranker, console: Terminal) -> None:
    """Print each question with the first passages of BM25 and of the reranker, and the best passage's best sentence."""
    name = reranker.model_name
    questions = demo_questions()
    console.print(
        f"The first {len(questions)} of 40 questions whose answer BM25 does not rank first. {name} reranks BM25's ten "
        "passages. A star marks the passage that answers, and a mark in the best passage its best sentence.\n"
    )
    for query, candidates in questions.items():
        ranking = reranker.rank(query, [candidate.text for candidate in candidates], top_n=ROWS)
        best = candidates[ranking[0].index]
        (sentence,) = reranker.highlight(query, [best.body])
        table = Table("", "BM25", name, "was", "probability", box=None, pad_edge=False)
        for place, passage in enumerate(ranking):
            before, after = candidates[place], candidates[passage.index]
            table.add_row(
                str(place + 1),
                f"{'*' if before.answers else ' '} {before.title}",
                Text(f"{'*' if after.answers else ' '} {after.title}", style="green" if after.answers else ""),
                str(passage.index + 1),
                f"{passage.score.probability:.2f}",
            )
        for column in table.columns[1:3]:
            column.overflow, column.no_wrap, column.max_width = "ellipsis", True, (console.width - OTHER_COLUMNS) // 2
        for column in table.columns[3:]:
            column.justify = "right"
        console.print(Text(query, style="bold"))
        console.print(table)
        console.print(Padding(_marked(best.body, sentence, plain=not console.is_terminal), (0, 0, 1, 3)))
    console.print("Next: rank passages of your own, one in each line of a file.")
    console.print(Text('  mistral-rerank rank "your question" passages.txt --highlight', style="bold"))


def _marked(text: str, sentence: Span | None, *, plain: bool) -> Text:
    """Mark a sentence of a passage: by colour, or in plain text by brackets."""
    start, end = sentence or (0, len(text))
    left, right = ("[", "]") if plain else ("", "")
    return Text.assemble(text[:start], left, (text[start:end], MARK), right, text[end:])
