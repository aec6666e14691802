"""The HTML report of an evaluation: one file, filled in from `templates/`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistral_rerank.data_files.atomic import atomic_write
from mistral_rerank.errors import MissingDependencyError
from mistral_rerank.evaluation.metrics import HEADLINE, MEASURES
from mistral_rerank.evaluation.plots import gains_plot, interval_plot, line_plot, reliability_plot

try:
    import jinja2
except ImportError as error:
    raise MissingDependencyError.of("eval", error) from error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mistral_rerank.evaluation.results import Figures, SetResult, Timing


def render(template: str, file: Path, **values: object) -> None:
    """Write a template of `templates/`, filled in; values are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mistral_rerank.evaluation"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["reliability_plot"] = reliability_plot
    with atomic_write(file) as out:
        out.write(environment.get_template(template).render(values) + "\n")


def write_report(
    figures: Sequence[Figures],
    results: Sequence[SetResult],
    settings: Mapping[str, object],
    timing: Timing,
    file: Path,
) -> None:
    """Write the report of an evaluation.

    Args:
        figures: of every set, then their mean.
        results: the same sets, query by query.
        settings: what was evaluated, and how.
        timing: how long it took.
        file: the HTML file to write.

    """
    mean = figures[-1]
    milliseconds = sorted((1000 * seconds, depth) for depth, seconds in timing.latencies.items())
    render(
        "evaluation.html",
        file,
        figures=figures,
        mean=mean,
        results=results,
        settings=settings,
        timing=timing,
        by_depth={depth: [values[name] for name in HEADLINE] for depth, values in mean.by_depth.items()},
        headline=HEADLINE,
        measures=(*HEADLINE, *(name for name in MEASURES if name not in HEADLINE)),
        summary=summary(mean, settings["first_stage"], settings["top_k"]),
        gain_plots=[
            interval_plot({of_set.name: of_set.gain[name] for of_set in figures}, title=f"Gain in {name}")
            for name in HEADLINE[:2]
        ],
        win_plots=[
            gains_plot(result.gains("nDCG@10"), title=f"{result.name}: nDCG@10 gain of every query, sorted")
            for result in results
        ],
        depth_plot=line_plot(
            {name: [(depth, values[name]) for depth, values in mean.by_depth.items()] for name in HEADLINE},
            title="Mean quality by number of candidates reranked",
            x_name="candidates reranked (0: the first stage alone)",
            y_name="mean over sets",
            evenly=True,
        ),
        latency_plot=line_plot(
            {name: [(ms, mean.by_depth[depth][name]) for ms, depth in milliseconds] for name in HEADLINE},
            title="Mean quality by milliseconds to rerank a question",
            x_name="milliseconds to rerank a question",
            y_name="mean over sets",
        )
        if milliseconds
        else None,
    )


def summary(mean: Figures, first_stage: object, top_k: object) -> str:
    """State the result in two sentences."""
    before, after, gain = mean.first_stage["nDCG@10"], mean.reranked["nDCG@10"], mean.gain["nDCG@10"]
    return (
        f"Reranking the first {top_k} of {first_stage} takes mean nDCG@10 from {before:.3f} to {after:.3f}: "
        f"{gain.mean:+.3f}, 95% interval {gain.low:+.3f} to {gain.high:+.3f}. "
        f"Of {mean.queries} questions {mean.wins} gain and {mean.losses} lose."
    )
