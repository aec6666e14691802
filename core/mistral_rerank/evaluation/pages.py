"""Pieces of an HTML page of one file, which asks nothing of the network and runs no script."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from mistral_rerank.evaluation.plots import reliability_plot

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mistral_rerank.evaluation.reliability import Reliability

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, body: str) -> str:
    """Make the page."""
    style = (files("mistral_rerank.evaluation") / "page.css").read_text("utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{body}</main></body></html>\n"
    )


def section(title: str, content: str) -> str:
    """Make a part of the page with a heading."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def figure(name: str, plot: str) -> str:
    """Put a name above a plot."""
    return f"<figure><figcaption>{escape(name)}</figcaption>{plot}</figure>"


def details(summary: str, content: str) -> str:
    """Make a part that is closed at first."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def row(name: object, *cells: object) -> str:
    """Make a table's row; numbers with four decimals."""
    words = [f"{cell:.4f}" if isinstance(cell, float) else escape(str(cell)) for cell in cells]
    return f'<tr><th scope="row">{escape(str(name))}</th>' + "".join(f"<td>{word}</td>" for word in words) + "</tr>"


def table(caption: str, head: Iterable[str], rows: Iterable[str]) -> str:
    """Make a table that scrolls where the window is too narrow, by keyboard too."""
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr>{cells}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def reliability_section(found: Mapping[str, Reliability]) -> str:
    """Draw and tabulate reliabilities."""
    plot = reliability_plot(found, title="Share of relevant pairs against probability")
    rows = [row(name, of.pairs, f"{of.relevant:.1%}", of.ece, of.brier, of.nll) for name, of in found.items()]
    bins = "".join(
        table(
            f"{name}, bin by bin",
            ("bin", "pairs", "mean probability", "share relevant"),
            (row(number, b.pairs, b.probability, b.share) for number, b in enumerate(of.bins, start=1)),
        )
        for name, of in found.items()
    )
    head = ("probability", "pairs", "relevant", "ECE", "Brier", "NLL")
    return table("Calibration", head, rows) + f"<figure>{plot}</figure>" + details("Reliability table", bins)
