import re
import warnings
from xml.etree import ElementTree

import pytest

from mistral_rerank.evaluation.metrics import Interval
from mistral_rerank.evaluation.plots import gains_plot, interval_plot, line_plot


@pytest.fixture(autouse=True)
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def texts(plot):
    return [text.text for text in ElementTree.fromstring(plot.svg).iterfind(".//{*}text")]


@pytest.mark.parametrize("name", ["a$b$", "5$", r"\frac{1}{", "<b>&amp;</b>", "漢字", "x_1^2"])
def test_a_name_is_drawn_as_it_is(name):
    assert name in texts(interval_plot({name: Interval(0.1, 0.0, 0.2)}, title=name))


def test_a_long_name_is_cut():
    assert f"{'x' * 23}…" in texts(interval_plot({"x" * 255: Interval(0.1, 0.0, 0.2)}, title="t"))


def test_equal_figures_give_equal_bytes():
    first, second = (gains_plot([0.5, -0.25, 0.0], title="gains").svg for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("gains", "colors"), [([0.5], {"#2ca02c"}), ([-0.5], {"#d62728"}), ([0.5, -0.5], {"#2ca02c", "#d62728"}), ([0.0], set())])  # fmt: skip
def test_wins_are_green_and_losses_red(gains, colors):
    visible = set()
    for area in ElementTree.fromstring(gains_plot(gains, title="gains").svg).iterfind(".//{*}path[@style]"):
        heights = set(re.findall(r"[ML] \S+ (\S+)", area.get("d")))
        if len(heights) > 1:  # an area of zeros is drawn too, without height
            visible.update(re.findall(r"fill: (#2ca02c|#d62728)", area.get("style")))
    assert visible == colors


def test_every_series_is_drawn_and_named():
    series = {f"measure {number}": [(0, number), (5, number + 1)] for number in range(5)}
    plot = line_plot(series, title="t", x_name="candidates", y_name="mean", evenly=True)
    assert [text for text in texts(plot) if text.startswith("measure")] == list(series)
    assert {"candidates", "mean", "0", "5"} <= set(texts(plot))
