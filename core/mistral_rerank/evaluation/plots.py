"""Plots as inline SVG: no file, no script, no font of their own; colours come from the page, light or dark.

Each is an image with a name for screen readers; the page has its figures in a table as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mistral_rerank.evaluation.metrics import Interval
    from mistral_rerank.evaluation.reliability import Reliability

Point = tuple[float, float]
MOST_BARS = 400
"""More values than this are drawn as this many quantiles."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values on a stretch of pixels; `start` may lie beyond `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Give the pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Give round values within the range."""
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(count * step, 12) for count in range(first, math.floor(self.high / step + 1e-9) + 1)]


def spread(values: Iterable[float], *, margin: float = 0.06) -> tuple[float, float]:
    """Give a range that holds all values with a margin, and is never empty."""
    kept = list(values)
    low, high = min(kept), max(kept)
    pad = (high - low) * margin or abs(high) * 0.1 or 0.1
    return low - pad, high + pad


def interval_plot(rows: Sequence[tuple[str, Interval]], *, title: str) -> str:
    """Draw one row a name: its mean as a dot, its interval as a line, and where zero is."""
    left, width, row = 150, 640, 30
    low, high = spread([0.0, *(value for _, i in rows for value in (i.low, i.high))])
    x, bottom = Axis(low, high, left, width - 20), len(rows) * row + 10
    parts = [
        _vertical_grid(x, 0, bottom),
        f'<line class="zero" x1="{x.at(0):.1f}" x2="{x.at(0):.1f}" y1="0" y2="{bottom}"/>',
    ]
    for number, (name, value) in enumerate(rows):
        y = number * row + row / 2 + 5
        kind = "up" if value.low > 0 else "down" if value.high < 0 else "unsure"
        words = f"{name}: {value.mean:+.4f}, 95% interval {value.low:+.4f} to {value.high:+.4f}"
        parts.append(
            f'<g class="{kind}"><title>{escape(words)}</title>'
            + _text("name", left - 10, y + 4, _short(name, 20), anchor="end")
            + f'<line class="bar" x1="{x.at(value.low):.1f}" x2="{x.at(value.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle cx="{x.at(value.mean):.1f}" cy="{y:.1f}" r="5"/></g>'
        )
    return _svg("".join(parts), width, bottom + 26, title)


def gains_plot(gains: Sequence[float], *, title: str) -> str:
    """Draw every query's gain, from the worst loss to the best gain."""
    width, height, left, bottom = 640, 170, 46, 150
    ordered = sorted(gains)
    count = min(len(ordered), MOST_BARS)
    drawn = [ordered[round(i * (len(ordered) - 1) / max(1, count - 1))] for i in range(count)]
    most = max(0.1, *(abs(gain) for gain in ordered))
    y, step = Axis(-most, most, bottom, 10), (width - left - 10) / count
    bars = "".join(
        f'<rect class="{"up" if gain > 0 else "down"}" x="{left + i * step:.2f}" width="{max(step - 0.2, 0.4):.2f}" '
        f'y="{min(y.at(gain), y.at(0)):.1f}" height="{abs(y.at(gain) - y.at(0)):.1f}"/>'
        for i, gain in enumerate(drawn)
        if gain != 0
    )
    zero = f'<line class="zero" x1="{left}" x2="{width - 10}" y1="{y.at(0):.1f}" y2="{y.at(0):.1f}"/>'
    return _svg(_horizontal_grid(y, left, width - 10) + bars + zero, width, height, title)


def line_plot(
    series: Mapping[str, Sequence[Point]],
    *,
    title: str,
    x_name: str,
    y_name: str,
    evenly: bool = False,
) -> str:
    """Draw lines through points.

    Args:
        series: name -> points (x, y), in rising x.
        title: read by screen readers.
        x_name: what the x axis shows.
        y_name: what the y axis shows.
        evenly: whether the points of x stand at equal distances, whatever their values.

    """
    width, height, left, bottom = 640, 300, 60, 250
    values = sorted({point[0] for points in series.values() for point in points})
    places = {value: float(i) for i, value in enumerate(values)} if evenly else {value: value for value in values}
    x = Axis(*spread(places.values(), margin=0.04), left, width - 20)
    y = Axis(*spread(point[1] for points in series.values() for point in points), bottom, 30)
    marks = [(places[value], f"{value:g}") for value in values] if evenly else [(t, f"{t:g}") for t in x.ticks()]
    parts = [_horizontal_grid(y, left, width - 20)]
    parts += [_text("tick", x.at(place), bottom + 18, words) for place, words in marks]
    for number, (name, points) in enumerate(series.items()):
        at = [(x.at(places[a]), y.at(b), f"{name}, {a:g}: {b:.4f}") for a, b in points]
        parts.append(_series(number, name, left, at))
    parts.append(_text("axis", (left + width) / 2, height - 8, x_name))
    parts.append(_upright("axis", 14, (bottom + 30) / 2, y_name))
    return _svg("".join(parts), width, height, title)


def reliability_plot(found: Mapping[str, Reliability], *, title: str) -> str:
    """Draw the share of relevant pairs against the probability, bin by bin, beside the diagonal of perfect ones."""
    size, left, bottom = 380, 60, 330
    x, y = Axis(0, 1, left, left + 300), Axis(0, 1, bottom, 30)
    parts = [_horizontal_grid(y, left, left + 300)]
    parts.append(f'<line class="diagonal" x1="{x.at(0)}" y1="{y.at(0)}" x2="{x.at(1)}" y2="{y.at(1)}"/>')
    parts += [_text("tick", x.at(t), bottom + 18, f"{t:g}") for t in x.ticks()]
    parts.append(_text("axis", left + 150, bottom + 40, "probability"))
    parts.append(_upright("axis", 14, 180, "share relevant"))
    for number, (name, of) in enumerate(found.items()):
        at = [
            (
                x.at(part.probability),
                y.at(part.share),
                f"{name}: probability {part.probability:.3f}, {part.share:.3f} relevant of {part.pairs} pairs",
            )
            for part in of.bins
        ]
        parts.append(_series(number, name, left, at))
    return _svg("".join(parts), size, size, title)


def standalone(plot: str) -> str:
    """Make a file of a plot: with the page's colours inside, for an `<img>` of another page."""
    style = (files("mistral_rerank.evaluation") / "page.css").read_text("utf-8")
    return plot.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        ">", f"><style>{style}</style>", 1
    )


def _series(number: int, name: str, left: float, points: Sequence[tuple[float, float, str]]) -> str:
    """Draw a line through pixels, each with its words, and the name in the legend."""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(words)}</title></circle>' for x, y, words in points
    )
    legend = _text("legend", left + number * 150, 16, f"● {_short(name, 18)}", anchor="start")
    return f'<g class="line s{number % 6}"><polyline points="{line}"/>{dots}{legend}</g>'


def _text(kind: str, x: float, y: float, words: str, *, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _upright(kind: str, x: float, y: float, words: str) -> str:
    place = f"translate({x:g} {y:g}) rotate(-90)"
    return f'<text class="{kind}" transform="{place}" text-anchor="middle">{escape(words)}</text>'


def _svg(content: str, width: float, height: float, title: str) -> str:
    box = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}"'
    return f'<svg {box} role="img" aria-label="{escape(title)}">{content}</svg>'


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _horizontal_grid(y: Axis, left: float, right: float) -> str:
    return "".join(
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y.at(t):.1f}" y2="{y.at(t):.1f}"/>'
        + _text("tick", left - 6, y.at(t) + 4, f"{t:g}", anchor="end")
        for t in y.ticks()
    )


def _vertical_grid(x: Axis, top: float, bottom: float) -> str:
    return "".join(
        f'<line class="grid" x1="{x.at(t):.1f}" x2="{x.at(t):.1f}" y1="{top}" y2="{bottom}"/>'
        + _text("tick", x.at(t), bottom + 18, f"{t:+g}" if t else "0")
        for t in x.ticks()
    )
