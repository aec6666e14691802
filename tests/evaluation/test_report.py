"""The report in a real browser, from a file; it may ask nothing of anyone."""

from __future__ import annotations

import base64
import re
import shutil
from xml.etree import ElementTree

import pytest
from support import FACTS, LengthReranker

from mistral_rerank.evaluation.datasets import load_beir
from mistral_rerank.evaluation.evaluate import evaluate
from mistral_rerank.evaluation.workspace import EvaluationSettings

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script> & \"quoted\""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An evaluation of two sets, one of them with markup in its texts."""
    folder = tmp_path_factory.mktemp("report")
    hostile = folder / "hostile <b>$set$"
    shutil.copytree(FACTS, hostile)
    for name in ("corpus.jsonl", "queries.jsonl"):
        text = (hostile / name).read_text("utf-8")
        marked = HOSTILE.replace('"', '\\"')
        (hostile / name).write_text(text.replace('"text": "', f'"text": "{marked} '), encoding="utf-8")
    found = evaluate(LengthReranker(), EvaluationSettings(data=(FACTS, hostile), top_k=20), folder / "out")
    return folder / "out" / "report.html", found


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, made):
    """The report, opened; what it asks of others or complains about fails the test."""
    context = browser.new_context()
    opened, faults = context.new_page(), []
    opened.on(
        "request",
        lambda request: faults.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
    )
    opened.on("console", lambda message: faults.append(message.text))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.goto(made[0].as_uri())
    yield opened
    context.close()
    assert faults == []


def drawings(html):
    """The SVG of every plot, read as XML."""
    return [
        ElementTree.fromstring(base64.b64decode(coded))
        for coded in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    ]


def test_the_report_names_no_address_of_anyone(made):
    html = made[0].read_text("utf-8")
    assert re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!data:,)[^\s\"'>]+", html.split("<main>")[0]) == []
    assert set(re.findall(r'<[^>]* (?:src|href)="([^";,]+)', html.split("<main>")[1])) == {"data:image/svg+xml"}
    assert "default-src 'none'" in html.split("<style>")[0]
    assert "http:" not in html
    assert "https:" not in html
    assert "<script" not in html
    for svg in drawings(html):
        elements = list(svg.iter())
        assert not {element.tag.split("}")[1] for element in elements} & {"script", "image", "foreignObject", "a"}
        assert all(value[0] == "#" for e in elements for name, value in e.attrib.items() if name.endswith("href"))
        assert not re.search(r"@import|url\((?!#)", ElementTree.tostring(svg, encoding="unicode"))


def test_plots_show_the_figures_of_the_evaluation(made):
    gains, _, facts, hostile, depths, latency, reliability = drawings(made[0].read_text("utf-8"))
    of_sets = [figure.name for figure in made[1]]
    texts = [[text.text for text in svg.iterfind(".//{*}text")] for svg in (gains, depths, latency, reliability)]
    assert [text for text in texts[0] if not re.search(r"\d", text)] == of_sets == ["facts", "hostile <b>$set$", "mean"]
    assert [text for text in texts[1] if text.isdigit()] == ["0", "2", "5", "10", "20"]
    for words in texts[1:3]:
        assert words[-3:] == ["nDCG@10", "Recall@5", "MRR"]
    assert {"probability", "share relevant", "current"} <= set(texts[3])
    points = [len(svg.findall(".//{*}g[@clip-path]/{*}use")) for svg in (gains, depths, latency, reliability)]
    assert points == [3, 3 * 5, 3 * 4, 15]
    assert all("#d62728" in ElementTree.tostring(svg, encoding="unicode") for svg in (facts, hostile)), "losses are red"


def test_figures_are_those_of_the_evaluation(page, made):
    facts = made[1][0]
    row = page.get_by_role("row").filter(has_text="facts").filter(has_text="Recall@5").first
    cells = row.get_by_role("cell").all_text_contents()
    gain = facts.gain["Recall@5"]
    assert cells == [
        "40",
        "Recall@5",
        f"{facts.first_stage['Recall@5']:.4f}",
        f"{facts.reranked['Recall@5']:.4f}",
        f"{gain.mean:+.4f}",
        f"{gain.low:+.4f} to {gain.high:+.4f}",
        f"{facts.ceiling:.4f}",
    ]
    lead = page.locator(".lead").text_content()
    assert f"to {made[1][-1].reranked['nDCG@10']:.3f}" in lead


def test_every_plot_is_drawn_and_has_a_name_and_a_table_of_its_figures(page, made):
    plots = page.get_by_role("img")
    names = [plots.nth(i).get_attribute("alt") for i in range(plots.count())]
    assert names[:2] == ["Gain in nDCG@10", "Gain in Recall@5"]
    assert len(names) == 7  # two of gains, one of wins for each set, candidates, latency, reliability
    assert all(page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 200)"))
    mean = made[1][-1]

    def cells(caption):
        rows = page.locator("table").filter(has_text=caption).locator("tbody tr")
        return [rows.nth(i).locator("th, td").all_text_contents() for i in range(rows.count())]

    assert cells("Mean over sets") == [
        [str(depth), *(f"{values[name]:.4f}" for name in ("nDCG@10", "Recall@5", "MRR"))]
        for depth, values in mean.by_depth.items()
    ]
    assert [row[0] for row in cells("Median of a few questions")] == ["2", "5", "10", "20"]
    assert cells("Queries whose nDCG@10 rose")[0] == ["facts", "4", "5", "31"]
    assert cells("bin by bin") == [
        [str(number), str(one.pairs), f"{one.probability:.4f}", f"{one.share:.4f}"]
        for number, one in enumerate(mean.reliability.bins, start=1)
    ]


def test_texts_with_markup_stay_text(page):
    assert page.title().startswith("Evaluation of length over bm25")
    assert page.locator("main script, [onerror], b:text-is('$set$')").count() == 0
    assert page.locator("img").count() == page.locator("img[src^='data:image/svg+xml;base64,']").count()
    assert page.get_by_role("heading", name="hostile <b>$set$: worst losses").count() == 1
    summary = page.locator("summary").filter(has_text="onerror").first
    assert HOSTILE in summary.text_content()


def test_losses_are_read_by_keyboard_alone(page):
    first = page.locator("section").last.locator("summary").first
    first.focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    shown = page.locator("section").last.locator("details").first
    sync_api.expect(shown.get_by_role("heading", name="First stage")).to_be_visible()
    assert shown.locator("ol").count() == 2
    assert shown.locator("ol").first.locator("li").count() == 3


def test_the_worst_loss_comes_first_and_shows_what_it_lost(page, made):
    section = page.locator("section").last
    worst = section.locator("details").first
    facts = load_beir(FACTS)
    gains = section.locator("h3:text-is('facts: worst losses') ~ details > summary > .loss").all_text_contents()
    assert gains[:10] == sorted(gains[:10], key=float)
    query = re.search(r"\((\w+)\)$", worst.locator("summary").text_content().strip())[1]
    (relevant,) = facts.positives(query)
    assert worst.locator("ol").first.locator("b.gain").count() <= 1
    if worst.locator("ol").first.locator("b.gain").count():
        text = worst.locator("ol").first.locator("li:has(b.gain)").text_content()
        assert facts.corpus[relevant][:100] in text


def test_the_page_fits_a_narrow_window_and_follows_the_scheme(browser, made):
    def look(scheme, width):
        page = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 700}).new_page()
        page.goto(made[0].as_uri())
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))
        width = page.evaluate("document.documentElement.scrollWidth")
        page.context.close()
        return light, width

    assert look("dark", 1000)[0] < 150 < 600 < look("light", 1000)[0]
    assert look("light", 320)[1] == 320
