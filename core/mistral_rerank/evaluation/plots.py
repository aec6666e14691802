"""Plots of reports and training runs, drawn by matplotlib as SVG without a display."""

from __future__ import annotations

import base64
import io
import itertools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mistral_rerank.errors import MissingDependencyError

try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingDependencyError.of("eval", error) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.axes import Axes

    from mistral_rerank.evaluation.metrics import Interval, Reliability

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "0.9",
    "legend.frameon": False,
    "lines.markersize": 4,
    "svg.fonttype": "none",  # text stays text, in the reader's fonts
    "svg.hashsalt": "mistral-rerank",  # equal figures give equal bytes
    "text.parse_math": False,  # a "$" in a data set's name is a dollar sign
}
GAIN, LOSS, UNCLEAR = "tab:green", "tab:red", "0.5"


@dataclass(frozen=True, slots=True)
class Plot:
    """An SVG drawing and its alternative text."""

    title: str
    svg: str

    @property
    def data_uri(self) -> str:
        """The drawing as the `src` of an `<img>`."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode()}"


def interval_plot(intervals: Mapping[str, Interval], *, title: str) -> Plot:
    """Draw one row a name: the mean as a dot and its interval as a line, beside a line at zero."""

    def draw(axes: Axes) -> None:
        axes.axvline(0, color="0.3", linewidth=0.8)
        for row, interval in enumerate(intervals.values()):
            color = GAIN if interval.low > 0 else LOSS if interval.high < 0 else UNCLEAR
            axes.plot([interval.low, interval.high], [row, row], color=color)
            axes.plot([interval.mean], [row], "o", color=color)
        axes.set_yticks(range(len(intervals)), [_short(name) for name in intervals])
        axes.set_ylim(len(intervals) - 0.5, -0.5)

    return _plot(draw, title, height=0.6 + 0.3 * len(intervals))


def gains_plot(gains: Sequence[float], *, title: str) -> Plot:
    """Draw every query's gain, from the worst loss to the best gain."""

    def draw(axes: Axes) -> None:
        ordered = sorted(gains)
        axes.stairs([min(gain, 0) for gain in ordered], fill=True, color=LOSS)
        axes.stairs([max(gain, 0) for gain in ordered], fill=True, color=GAIN)
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set(xlabel="queries, by gain", ylabel="gain")

    return _plot(draw, title, height=2)


def line_plot(
    series: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x_name: str, y_name: str, evenly: bool = False
) -> Plot:
    """Draw lines through points (x, y); `evenly` puts the x values, which all series share, at equal distances."""

    def draw(axes: Axes) -> None:
        for (name, points), style in zip(series.items(), itertools.cycle(("-", "--", ":")), strict=False):
            xs, ys = zip(*points, strict=True)
            axes.plot(range(len(xs)) if evenly else xs, ys, style, marker="o", label=name)
        if evenly:
            axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
        axes.set(xlabel=x_name, ylabel=y_name)

    return _plot(draw, title, height=3)


def reliability_plot(reliabilities: Mapping[str, Reliability], *, title: str) -> Plot:
    """Draw the share of relevant pairs against the probability, bin by bin, beside the diagonal of perfect ones."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], "--", color="0.5", linewidth=1)
        for name, reliability in reliabilities.items():
            bins = reliability.bins
            axes.plot([each.probability for each in bins], [each.share for each in bins], marker="o", label=name)
        axes.set(xlabel="probability", ylabel="share relevant", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect=1)

    return _plot(draw, title, width=4.5, height=4)


def _plot(draw: Callable[[Axes], None], title: str, *, height: float, width: float = 6.6) -> Plot:
    """Let `draw` fill the axes of a figure, whose size is in inches, and give the figure as SVG."""
    svg = io.StringIO()
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts draw the text
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper left", ncols=4)
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    return Plot(title, svg.getvalue())


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
