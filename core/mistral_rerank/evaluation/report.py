"""The report of an evaluation, for people."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from mistral_rerank.evaluation.metrics import HEADLINE, MEASURES
from mistral_rerank.evaluation.pages import details, figure, page, reliability_section, row, section, table
from mistral_rerank.evaluation.plots import gains_plot, interval_plot, line_plot
from mistral_rerank.files import replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from mistral_rerank.evaluation.results import Example, Figures, SetResult, Shown, Timing

LONGEST_TEXT = 400
"""Characters of a passage that are shown."""


def write_report(
    found: Sequence[Figures], results: Sequence[SetResult], asked: Mapping[str, object], timing: Timing, file: Path
) -> None:
    """Write the report of an evaluation.

    Args:
        found: figures of every set, then their mean.
        results: the same sets, query by query.
        asked: the settings.
        timing: what it took.
        file: where to write.

    """
    mean, top_k = found[-1], int(str(asked["top_k"]))
    settings = "; ".join(f"{key} {_words(value)}" for key, value in asked.items() if value not in (None, {}, False))
    sections = [
        f'<p class="lead">{escape(summary(mean, str(asked["first_stage"]), top_k))}</p>',
        f'<p class="soft">{escape(settings)}</p>',
        section("Figures", _figures(found, top_k)),
        section("Gain per set", _gains(found)),
        section("Wins and losses, query by query", _wins(found, results)),
        section("Quality against candidates", _by_depth(found[-1])),
        section("Quality against latency", _by_latency(mean, timing)),
        section("Do the probabilities mean what they say?", _reliability(mean)),
        section("The questions that changed most", "".join(_examples(result) for result in results)),
    ]
    title = f"Evaluation of {asked['model']} over {asked['first_stage']}"
    with replacing(file) as out:
        out.write(page(title, "".join(sections)))


def summary(mean: Figures, first_stage: str, top_k: int) -> str:
    """Say what came out in two sentences."""
    before, after, gain = mean.first_stage["nDCG@10"], mean.reranked["nDCG@10"], mean.gain["nDCG@10"]
    return (
        f"Reranking the first {top_k} of {first_stage} takes mean nDCG@10 from {before:.3f} to {after:.3f}: "
        f"{gain.mean:+.3f}, 95% interval {gain.low:+.3f} to {gain.high:+.3f}. "
        f"Of {mean.queries} questions {mean.wins} gain and {mean.losses} lose."
    )


def _figures(found: Sequence[Figures], top_k: int) -> str:
    rows = []
    for of_set in found:
        for measure in (*HEADLINE, *(name for name in MEASURES if name not in HEADLINE)):
            gain = of_set.gain[measure]
            cells = of_set.first_stage[measure], of_set.reranked[measure], f"{gain.mean:+.4f}"
            interval = f"{gain.low:+.4f} to {gain.high:+.4f}"
            rows.append(row(of_set.name, of_set.queries, measure, *cells, interval, of_set.ceiling))
    head = (
        "set",
        "queries",
        "measure",
        "first stage",
        "reranked",
        "gain",
        "95% interval",
        f"ceiling: Recall@{top_k}",
    )
    caption = (
        f"Means over queries; “mean” is the unweighted mean of the sets; ceiling is the candidates' Recall@{top_k}"
    )
    return table(caption, head, rows)


def _gains(found: Sequence[Figures]) -> str:
    plots = (
        figure(measure, interval_plot([(f.name, f.gain[measure]) for f in found], title=f"Gain in {measure}"))
        for measure in HEADLINE[:2]
    )
    note = "<p>Dots are mean gains, lines their 95% bootstrap intervals over queries.</p>"
    return f'{note}<div class="plots">{"".join(plots)}</div>'


def _wins(found: Sequence[Figures], results: Sequence[SetResult]) -> str:
    rows = (row(f.name, f.wins, f.queries - f.wins - f.losses, f.losses) for f in found[:-1])
    plots = (
        figure(of.name, gains_plot(of.gains("nDCG@10"), title=f"{of.name}: nDCG@10 gain of every query, sorted"))
        for of in results
    )
    counts = table("Queries whose nDCG@10 rose, stayed, fell", ("set", "wins", "same", "losses"), rows)
    return f'{counts}<div class="plots">{"".join(plots)}</div>'


def _by_depth(mean: Figures) -> str:
    plot = line_plot(
        {name: [(float(depth), values[name]) for depth, values in mean.by_depth.items()] for name in HEADLINE},
        title="Mean quality against the number of candidates reranked",
        x_name="candidates reranked (0: the first stage alone)",
        y_name="mean over sets",
        evenly=True,
    )
    rows = (row(depth, *(values[name] for name in HEADLINE)) for depth, values in mean.by_depth.items())
    return f"<figure>{plot}</figure>{details('As a table', table('Mean over sets', ('candidates', *HEADLINE), rows))}"


def _by_latency(mean: Figures, timing: Timing) -> str:
    if not timing.latencies:
        return "<p>Not timed: no question had enough candidates, or an embedding model keeps its vectors.</p>"
    taken = sorted((seconds * 1000, depth) for depth, seconds in timing.latencies.items())
    plot = line_plot(
        {name: [(ms, mean.by_depth[depth][name]) for ms, depth in taken] for name in HEADLINE},
        title="Mean quality against the milliseconds that reranking a question takes",
        x_name="milliseconds a question (reranking alone)",
        y_name="mean over sets",
    )
    rows = (row(depth, f"{ms:.0f}", *(mean.by_depth[depth][name] for name in HEADLINE)) for ms, depth in taken)
    record = timing.record()
    where = f"{record['machine']}, Python {record['python']}, mistral-rerank {record['mistral-rerank']}"
    figures = table("Median of a few questions of the first set", ("candidates", "ms", *HEADLINE), rows)
    return f'<figure>{plot}</figure>{figures}<p class="soft">{escape(where)}</p>'


def _reliability(mean: Figures) -> str:
    if mean.reliability is None:
        return "<p>No pair was scored.</p>"
    note = (
        "<p>All reranked pairs of all sets, in bins of equal size; a passage that nobody judged counts as not "
        "relevant. On the dashed line a probability of 0.8 is right 8 times of 10.</p>"
    )
    return note + reliability_section({"as it is": mean.reliability})


def _examples(result: SetResult) -> str:
    losses = [example for example in result.examples if example.gain < 0]
    wins = [example for example in result.examples if example.gain > 0]
    worst = "".join(map(_example, losses)) or "<p>No question lost.</p>"
    best = details(f"{result.name}: best gains ({len(wins)})", "".join(map(_example, wins))) if wins else ""
    return f"<h3>{escape(result.name)}: worst losses</h3>{worst}{best}"


def _example(example: Example) -> str:
    kind = "up" if example.gain > 0 else "down"
    return (
        f'<details><summary><span class="gain {kind}">{example.gain:+.3f}</span> {escape(example.text)} '
        f'<span class="soft">({escape(example.query)})</span></summary><div class="pair">'
        f"<div><h4>First stage</h4>{_shown(example.before)}</div><div><h4>Reranked</h4>{_shown(example.after)}</div>"
        "</div></details>"
    )


def _shown(passages: Iterable[Shown]) -> str:
    items = []
    for shown in passages:
        words = "not judged" if shown.grade is None else "relevant" if shown.grade > 0 else "judged not relevant"
        grade = f", grade {shown.grade}" if shown.grade is not None and shown.grade > 1 else ""
        text = " ".join(shown.text.split())
        cut = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"
        kind = "yes" if shown.grade is not None and shown.grade > 0 else "no"
        items.append(f'<li><span class="grade {kind}">{words}{grade}</span> {escape(cut)}</li>')
    return f"<ol>{''.join(items)}</ol>"


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
