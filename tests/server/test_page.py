"""The page at / in a real browser, in front of a real server.

Needs Chromium or Chrome on the PATH (Debian: apt-get install chromium) and playwright, whose own browsers are not used.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout

import pytest
from server.running import running
from support import FailingReranker, LengthReranker, make_adapter

from mistral_rerank import RerankSettings, ScoringError

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
expect = sync_api.expect

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")

KEY = "sk-of-this-test"
NASTY = "it's \"so\" \\n ${HOME} `id` $(id) !! %s {x}\n'''\"\"\"\\\nnext \\' </script><!-- é 漢 🙂 \u2028 \u202e end\\"
HOSTILE = ["<img src=x onerror=\"window.hacked = 'yes'\"><script>window.hacked = 'yes'</script>", NASTY, "plain"]
TABS = ["curl", "Python", "JavaScript", "LangChain", "LlamaIndex"]


@pytest.fixture(scope="module")
def page_url():
    with running(LengthReranker()) as url:
        yield f"{url}/"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, page_url):
    """Opens pages; none may ask another origin, break its policy or raise an error of script."""
    contexts, faults = [], []

    def note(message):
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            faults.append(message.text)

    def open_page(url=page_url, **options):
        context = browser.new_context(reduced_motion="reduce", **options)
        contexts.append(context)
        context.set_default_timeout(60_000)  # 513 passages take long to lay out on a busy machine
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        page = context.new_page()
        page.sent = []
        page.on("request", lambda request: page.sent.append(request))
        page.on("console", note)
        page.on("pageerror", lambda error: faults.append(str(error)))
        with page.expect_response("**/v1/models"):
            page.goto(url)
        page.origin = url
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            faults += [
                request.url for request in page.sent if not request.url.startswith((page.origin, "data:", "blob:"))
            ]
        context.close()
    assert faults == []


@pytest.fixture
def page(visit):
    return visit()


def fill(page, question, passages, *, between="\n\n"):
    page.get_by_label("Question").fill(question)
    page.get_by_label("Passages").fill(between.join(passages))


def drop(page, name, content):
    """Drop a file on the field of the passages."""
    transfer = page.evaluate_handle(
        """([name, content]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([content], name));
            return transfer;
        }""",
        [name, content],
    )
    page.get_by_label("Passages").dispatch_event("drop", {"dataTransfer": transfer})


def rerank(page):
    page.get_by_role("button", name="Rerank").click()


def rankings(page):
    """What the page shows, a dict of every place."""
    expect(page.locator("#ranking li").first).to_be_visible()
    return page.locator("#ranking li").evaluate_all(
        """items => items.map((item) => ({
            place: item.querySelector(".place").textContent,
            text: item.querySelector(".text").textContent,
            bar: item.querySelector(".bar").getBoundingClientRect().width,
            track: item.querySelector(".track").getBoundingClientRect().width,
            probability: item.querySelector(".probability").textContent,
            logit: item.querySelector(".logit").textContent,
            was: item.querySelector(".was").textContent,
            cut: item.querySelector(".cut")?.textContent ?? null,
        }))"""
    )


def posts(page):
    return [request for request in page.sent if request.method == "POST"]


def snippet(page, tab):
    page.get_by_role("tab", name=tab).click()
    return page.locator("#snippet").text_content()


def texts_of(output):
    """The passages that a snippet printed after their probabilities."""
    return [line.partition(" ")[2] for line in output.splitlines()]


def test_the_sample_comes_back_in_the_servers_order(page):
    page.get_by_role("button", name="Load the sample").click()
    passages = page.get_by_label("Passages").input_value().split("\n\n")
    assert len(passages) == 8
    rerank(page)
    shown = rankings(page)
    expected = sorted(enumerate(passages), key=lambda item: -len(item[1]))
    assert [place["text"] for place in shown] == [text for _, text in expected]
    assert [place["was"].lstrip("↑↓ ") for place in shown] == [f"was {index + 1}" for index, _ in expected]
    assert [place["place"] for place in shown] == [str(number) for number in range(1, 9)]
    assert json.loads(posts(page)[0].post_data) == {
        "model": "length",
        "query": {"text": "Why does metal feel colder to the touch than wood at the same temperature?"},
        "passages": [{"text": text} for text in passages],
        "truncate": "END",
    }


def test_bars_and_figures_are_the_probabilities(page):
    fill(page, "which?", ["a", "aaaa", "aa"])
    rerank(page)
    shown = rankings(page)
    for place, length in zip(shown, [4, 2, 1], strict=True):
        probability = 1 / (1 + math.exp(-length))
        assert place["probability"] == f"{probability:.3f}"
        assert place["bar"] / place["track"] == pytest.approx(probability, abs=0.005)
        assert place["logit"] == f"logit {length:.2f}"
    assert [place["was"] for place in shown] == ["↑ was 2", "↑ was 3", "↓ was 1"]
    expect(page.get_by_role("status").first).to_contain_text("3 passages in ")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("one\ntwo\n\n", ["one", "two"]),
        ("one\nmore of one\n \t\n\n two\n", ["one\nmore of one", "two"]),
        ("  one  ", ["one"]),
    ],
)
def test_passages_are_lines_or_parted_by_blank_lines(page, typed, expected):
    fill(page, "which?", [typed])
    rerank(page)
    rankings(page)
    assert [passage["text"] for passage in json.loads(posts(page)[0].post_data)["passages"]] == expected
    expect(page.locator("#count")).to_have_text(f"Now: {len(expected)} passage{'s' * (len(expected) > 1)}.")


FILES = [
    ("a.txt", "one\r\n\n  two \n", ["one", "two"]),
    ("notes.txt", "[1] a note\n{not JSON}\n", ["[1] a note", "{not JSON}"]),
    ("bom.txt", "\ufeffone\n", ["one"]),
    ("a.jsonl", '{"_id": "1", "title": "A", "text": "one\\n\\ntwo"}\n\n{"contents": "c"}\n', ["A one two", "c"]),
    ("a.json", '["one", {"page_content": "two"}]', ["one", "two"]),
    ("object.json", '{\n  "text": "one"\n}', ["one"]),
]


@pytest.mark.parametrize(("name", "content", "expected"), FILES, ids=[name for name, _, _ in FILES])
@pytest.mark.parametrize("way", ["button", "drop"])
def test_a_file_fills_in_the_passages(page, way, name, content, expected):
    if way == "button":
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Open a file").click()
        chooser.value.set_files({"name": name, "mimeType": "text/plain", "buffer": content.encode()})
    else:
        drop(page, name, content)
    expect(page.get_by_label("Passages")).to_have_value("\n\n".join(expected))
    expect(page.locator("#count")).to_have_text(f"Now: {len(expected)} passage{'s' * (len(expected) > 1)}.")
    assert posts(page) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "id,text\n1,one\n", "reads no CSV"),
        ("a.jsonl", '{"text": "one"}\n{"body": "two"}\n', 'Passage 2 of the file is no JSON object with "text"'),
        ("a.jsonl", '{"text": "one"}\n{"text": \n', 'Passage 2 of the file is no JSON object with "text"'),
        ("a.txt", "one\0two", "is not UTF-8 text"),
        ("a.txt", "a" * 8_000_001, "has over 8 MB"),
    ],
)
def test_a_file_of_another_form_is_refused_and_the_passages_stay(page, name, content, said):
    fill(page, "which?", ["a", "b"])
    drop(page, name, content)
    expect(page.get_by_role("alert")).to_contain_text(said)
    expect(page.get_by_label("Passages")).to_have_value("a\n\nb")


@pytest.mark.parametrize(
    ("question", "passages", "said", "field"),
    [
        (" \n", ["a passage"], "The question is empty", "Question"),
        ("which?", [" ", "\n"], "There are no passages", "Passages"),
        ("which?", ["a"] * 513, "513 passages are too many", "Passages"),
    ],
)
def test_what_cannot_be_asked_is_said_and_not_sent(page, question, passages, said, field):
    fill(page, question, passages)
    rerank(page)
    expect(page.get_by_role("alert")).to_contain_text(said)
    expect(page.get_by_label(field)).to_be_focused()
    expect(page.get_by_label(field)).to_have_attribute("aria-invalid", "true")
    assert posts(page) == []
    fill(page, "which?", ["a"])
    rerank(page)
    rankings(page)
    expect(page.get_by_role("alert")).to_be_empty()
    expect(page.get_by_label(field)).to_have_attribute("aria-invalid", "false")


def test_an_error_of_the_server_is_shown_in_its_words(visit):
    with running(FailingReranker(ScoringError("the model ran out of memory for one pair"))) as url:
        page = visit(f"{url}/")
        fill(page, "which?", ["a", "b"])
        rerank(page)
        expect(page.get_by_role("alert")).to_have_text("the model ran out of memory for one pair (status 500)")
        expect(page.get_by_role("button", name="Rerank")).to_have_attribute("aria-busy", "false")
        expect(page.locator("#ranking li")).to_have_count(0)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"status": 502, "body": "<h1>Bad gateway</h1>"}, "The server answered 502"),
        ({"status": 200, "body": "<h1>Hello</h1>"}, "The answer is not one of v1/ranking"),
        ({"status": 200, "json": {"rankings": [{"index": 7, "logit": 1}]}}, "The answer is not one of v1/ranking"),
        (None, "The server cannot be reached"),
    ],
)
def test_an_answer_of_something_else_is_an_error(page, answer, said):
    page.route("**/v1/ranking", lambda route: route.fulfill(**answer) if answer else route.abort())
    fill(page, "which?", ["a", "b"])
    rerank(page)
    expect(page.get_by_role("alert")).to_contain_text(said)


def test_a_key_is_asked_for_sent_and_never_shown(visit):
    with running(LengthReranker(), api_keys=KEY) as url:
        page = visit(f"{url}/")
        fill(page, "which?", ["a", "bb"])
        rerank(page)
        expect(page.get_by_role("alert")).to_contain_text("asks for an API key")
        field = page.get_by_label("API key", exact=True)
        expect(field).to_be_focused()
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        assert [place["text"] for place in rankings(page)] == ["bb", "a"]
        assert posts(page)[-1].headers["authorization"] == f"Bearer {KEY}"
        for tab in TABS:
            code = snippet(page, tab)
            assert "MISTRAL_RERANK_API_KEY" in code
            assert KEY not in code
        page.reload()
        assert page.locator("#key").input_value() == ""
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_asking_again_gives_up_the_earlier_request(page):
    held = []
    page.route("**/v1/ranking", lambda route: route.continue_() if held else held.append(route))
    fill(page, "which?", ["a", "bb"])
    with page.expect_request("**/v1/ranking"):
        rerank(page)
    button = page.locator("#rerank")
    expect(button).to_have_attribute("aria-busy", "true")
    with page.expect_event("requestfailed"):
        button.click()
    assert [place["text"] for place in rankings(page)] == ["bb", "a"]
    expect(button).to_have_attribute("aria-busy", "false")
    expect(page.get_by_role("alert")).to_be_empty()


def test_a_hundred_passages(page):
    fill(page, "which?", ["x" * (1 + number * 37 % 100) for number in range(100)])
    rerank(page)
    assert [len(place["text"]) for place in rankings(page)] == list(range(100, 0, -1))


def test_many_results_leave_the_code_near(page):
    fill(page, "which?", ["x" * 200] * 60)
    rerank(page)
    assert len(rankings(page)) == 60
    height = page.viewport_size["height"]
    assert page.locator("#ranking").bounding_box()["height"] <= height
    page.locator("#results").scroll_into_view_if_needed()
    results, code = page.locator("#results").bounding_box(), page.locator("#code").bounding_box()
    assert code["y"] - results["y"] < 1.5 * height


def test_a_narrow_screen_scrolls_no_sideways(visit):
    page = visit(viewport={"width": 320, "height": 640})
    fill(page, "which?", ["w" * 300, "a passage " * 30, *HOSTILE])
    rerank(page)
    rankings(page)
    for tab in TABS:
        snippet(page, tab)
        assert page.evaluate("document.documentElement.scrollWidth") == 320


def test_the_dark_scheme_is_dark(visit):
    def lightness(page):
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))

    assert lightness(visit(color_scheme="dark")) < 150 < 600 < lightness(visit(color_scheme="light"))


@pytest.mark.parametrize(("scheme", "width"), [("light", 360), ("dark", 1360)])
def test_the_page_has_no_serious_accessibility_problem(visit, scheme, width):
    page = visit(color_scheme=scheme, viewport={"width": width, "height": 900})
    assert_accessible(page)
    page.get_by_role("button", name="Load the sample").click()
    rerank(page)
    rankings(page)
    assert_accessible(page)


def assert_accessible(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe()
    problems = [each for each in axe.run(page).response["violations"] if each["impact"] in ("serious", "critical")]
    assert [(problem["id"], problem["nodes"][0]["html"]) for problem in problems] == []


def test_all_is_done_by_keyboard_alone(page):
    page.keyboard.press("Tab")
    expect(page.get_by_label("Question")).to_be_focused()
    page.keyboard.type("which?")
    page.keyboard.press("Tab")
    page.keyboard.type("a\nbb")
    page.keyboard.press("Control+Enter")
    assert [place["text"] for place in rankings(page)] == ["bb", "a"]
    for stop in ("API key", "Rerank", "Load the sample", "Open a file", "curl"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == stop
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key, tab in [("ArrowRight", "Python"), ("End", "LlamaIndex"), ("ArrowRight", "curl"), ("ArrowLeft", "LlamaIndex"), ("Home", "curl"), ("ArrowRight", "Python")]:  # fmt: skip
        page.keyboard.press(key)
        expect(page.get_by_role("tab", name=tab)).to_be_focused()
        expect(page.get_by_role("tab", selected=True)).to_have_text(tab)
        expect(page.get_by_role("tabpanel", name=tab)).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#copied")).to_have_text("Copied: Python")
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#snippet").text_content()


def test_passages_with_markup_stay_text(page):
    fill(page, HOSTILE[0], HOSTILE)
    rerank(page)
    assert {HOSTILE[0], "plain"} <= {place["text"] for place in rankings(page)}
    assert page.locator("img, script:not([nonce]), main script").count() == 0
    assert page.evaluate("window.hacked") is None


def test_the_page_works_behind_a_prefix(visit, page_url):
    page = visit()
    page.route(
        "**/proxy/**",
        lambda route: route.fulfill(response=route.fetch(url=f"{page_url}{route.request.url.partition('/proxy/')[2]}")),
    )
    page.goto(f"{page_url}proxy/")
    fill(page, "which?", ["a", "bb"])
    rerank(page)
    rankings(page)
    assert posts(page)[0].url == f"{page_url}proxy/v1/ranking"
    assert f"{page_url}proxy/v1/ranking" in snippet(page, "curl")


@pytest.mark.parametrize("tab", ["Python", "LangChain", "LlamaIndex"])
def test_python_snippets_hold_any_text_and_give_the_servers_order(page, tab):
    passages = [HOSTILE[0], NASTY.replace("\n", " "), "plain"]
    fill(page, NASTY, passages)
    code = snippet(page, tab)
    values = {node.targets[0].id: node.value for node in ast.parse(code).body if isinstance(node, ast.Assign)}
    assert ast.literal_eval(values["query"]) == NASTY
    assert ast.literal_eval(values["passages"]) == passages
    with redirect_stdout(io.StringIO()) as printed, ThreadPoolExecutor(1) as thread:  # away from playwright's loop
        thread.submit(exec, compile(code, tab, "exec"), {}).result()
    printed = printed.getvalue().replace(passages[1], "nasty")
    assert texts_of(printed) == ["nasty" if text == passages[1] else text for text in sorted(passages, key=len)[::-1]]


def test_the_curl_snippet_holds_any_text_and_gives_the_servers_order(page, tmp_path):
    fill(page, NASTY, HOSTILE[::2])
    code = snippet(page, "curl")
    subprocess.run(["bash", "-n"], input=code, text=True, check=True)
    words = shlex.split(code)
    body = json.loads(words[words.index("--data-raw") + 1])
    assert body["query"]["text"] == NASTY
    assert [passage["text"] for passage in body["passages"]] == HOSTILE[::2]
    rerank(page)
    rankings(page)
    assert body == json.loads(posts(page)[0].post_data)
    if shutil.which("curl"):
        reply = subprocess.run(["bash"], input=code, text=True, check=True, capture_output=True).stdout
        assert [ranking["index"] for ranking in json.loads(reply)["rankings"]] == [0, 1]


def test_the_javascript_snippet_holds_any_text_and_gives_the_servers_order(page):
    fill(page, NASTY, ["plain", HOSTILE[0]])
    code = snippet(page, "JavaScript")
    assert "</script" not in code
    assert "<!--" not in code
    printed = page.evaluate(
        """async (code) => {
            const lines = [], console = { log: (...words) => lines.push(words.join(" ")) };
            await new (async () => {}).constructor("console", code)(console);
            return lines;
        }""",
        code,
    )
    assert texts_of("\n".join(printed)) == [HOSTILE[0], "plain"]
    assert json.loads(posts(page)[0].post_data)["query"]["text"] == NASTY


def test_snippets_are_complete_before_anything_is_typed(page):
    for tab in ("Python", "LangChain", "LlamaIndex"):
        ast.parse(snippet(page, tab))
    assert json.loads(shlex.split(snippet(page, "curl"))[-1])["passages"] == [
        {"text": "a passage"},
        {"text": "another passage"},
    ]


def test_the_best_sentence_of_the_first_passages_is_marked(page):
    passages = [
        "Short one. The longest sentence of this 🙂 passage! End.",
        "A <b>sentence</b> only",
        "One. Three words right here.",
    ]
    fill(page, "which?", passages)
    rerank(page)
    expect(page.locator("#ranking mark")).to_have_text(
        ["The longest sentence of this 🙂 passage!", "Three words right here.", "A <b>sentence</b> only"]
    )
    assert [place["text"] for place in rankings(page)] == sorted(passages, key=len, reverse=True)
    first, second = (json.loads(request.post_data) for request in posts(page))
    assert "highlight" not in first
    assert second["highlight"] is True


@pytest.fixture(scope="module")
def two_models(tiny, tmp_path_factory):
    """Two models with other weights; one reads 40 tokens of a pair, the other 50."""
    settings = RerankSettings(model=tiny, device="cpu", dtype="float32", max_length=40)
    other = make_adapter(tmp_path_factory.mktemp("second"), tiny, 1)
    second = settings.model_copy(update={"model": str(other), "base": str(tiny), "max_length": 50})
    return {"first": settings, "second": second}


def test_two_models_side_by_side(visit, two_models):
    passages = [f"passage {number} about {word}" for number, word in enumerate(["ice", "snow", "rain", "hail"], 1)]
    expected = {}
    for name, settings in two_models.items():
        with settings.open() as reranker:
            expected[name] = [(place.index, f"{place.score.probability:.3f}") for place in reranker.rank("q", passages)]
    with running(two_models) as url:
        page = visit(url)
        expect(page.get_by_label("Model", exact=True)).to_have_value("first")
        fill(page, "q", passages)
        page.get_by_label("Model", exact=True).select_option("second")
        assert "model='second'" in snippet(page, "Python").replace('"', "'")
        page.get_by_label("Compare with").select_option("first")
        rerank(page)
        assert [place["text"] for place in rankings(page)] == [passages[index] for index, _ in expected["second"]]
        items = page.locator("#ranking li")
        for item, (index, probability) in zip(items.all(), expected["second"], strict=True):
            there = [found for found, _ in expected["first"]].index(index)
            assert item.locator(".by").all_text_contents() == ["second", "first"]
            assert item.locator(".probability").all_text_contents() == [probability, expected["first"][there][1]]
            expect(item.locator(".there")).to_have_text(f"place {there + 1} with first")
        expect(page.locator("#summary")).to_contain_text("In the order of second.")
        assert_accessible(page)

        page.get_by_label("Compare with").select_option("no other model")
        rerank(page)
        expect(page.locator("#ranking .second")).to_have_count(0)


def test_what_was_cut_is_said(visit, two_models):
    with running(two_models) as url:
        page = visit(url)
        fill(page, "q", ["short", "long " * 100])
        rerank(page)
        cut = {place["text"]: place["cut"] for place in rankings(page)}
        assert cut["short"] is None
        first = cut[("long " * 100).strip()]
        assert re.fullmatch(r"cut: 40 tokens read, \d+ left out", first)

        page.get_by_label("Compare with").select_option("second")
        rerank(page)
        left_out = int(first.split()[-3])
        expect(page.locator("#ranking .cut")).to_have_text(
            [
                f"cut by first: 40 tokens read, {left_out} left out",
                f"cut by second: 50 tokens read, {left_out - 10} left out",
            ]
        )


def test_one_model_leaves_no_choice(page):
    expect(page.get_by_label("Compare with")).to_be_hidden()
    expect(page.locator("header")).to_contain_text("Model: length.")
