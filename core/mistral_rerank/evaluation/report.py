"""The HTML report of an evaluation: one file, filled in from `templates/`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

    from mistral_rerank.evaluation.results import Figures, SetResult


def render(template: str, file: Path, **values: object) -> None:
    """Write a template of `templates/`, filled in; values are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mistral_rerank.evaluation"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {"gains_plot": gains_plot, "reliability_plot": reliability_plot}
    with atomic_write(file) as out:
        out.write(environment.get_template(template).render(values) + "\n")


def write_report(
    figures: Sequence[Figures],
    results: Sequence[SetResult],
    settings: Mapping[str, object],
    timing: Mapping[str, Any],
    file: Path,
) -> None:
    """Write the report of an evaluation: `figures` are those of every set, then their mean."""
    mean, latencies = figures[-1], timing["median_seconds_of_a_query_by_depth"]
    milliseconds = sorted((1000 * seconds, depth) for depth, seconds in latencies.items())
    render(
        "evaluation.html",
        file,
        figures=figures,
        mean=mean,
        results=results,
        settings=settings,
        timing=timing,
        latencies=latencies,
        by_depth={depth: [values[name] for name in HEADLINE] for depth, values in mean.by_depth.items()},
        headline=HEADLINE,
        measures=(*HEADLINE, *(name for name in MEASURES if name not in HEADLINE)),
        gain_plots=[
            interval_plot({of_set.name: of_set.gain[name] for of_set in figures}, title=f"Gain in {name}")
            for name in HEADLINE[:2]
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
