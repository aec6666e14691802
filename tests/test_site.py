"""The docs site: built as `make docs` builds it, complete, and accessible in a real browser."""

import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import typer

from mistral_rerank.cli import app
from mistral_rerank.server.settings import ClusterSettings, ServerSettings
from mistral_rerank.settings import RerankSettings

pytest.importorskip("zensical", reason="zensical is not installed: pip install 'mistral-rerank[docs]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
IN = {"light, narrow": ("light", 360), "dark, wide": ("dark", 1360)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; a broken link or anchor ends the build with an error."""
    copy = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "docs", copy / "docs")
    shutil.copy(ROOT / "zensical.toml", copy)  # its folder is where the site goes
    for name in ("core", "langchain_mistral_rerank", "llama_index_mistral_rerank"):
        (copy / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "docs"), *sys.path])}
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    build = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
    assert build.returncode == 0, build.stdout + build.stderr
    return copy / "site"


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--allow-file-access-from-files"])
        yield browser
        browser.close()


def text_of(page):
    return unescape(re.sub(r"<[^>]+>", "", page.read_text("utf-8")))


def test_every_setting_is_listed_with_its_environment_variable(site):
    text = text_of(site / "reference" / "settings.html")
    for settings, prefix in [
        (RerankSettings, "MISTRAL_RERANK_"),
        (ServerSettings, "MISTRAL_RERANK_SERVER_"),
        (ClusterSettings, "MISTRAL_RERANK_CLUSTER_"),
    ]:
        for name, field in settings.model_fields.items():
            assert f"{name}{prefix}{name.upper()}\n" in text
            assert field.description.replace("`", "") in text


def test_every_command_is_listed_with_its_options(site):
    page = (site / "reference" / "command-line.html").read_text("utf-8")
    sections = re.split(r'<h2 id="mistral-rerank-([\w-]+)">', page)
    listed = dict(zip(sections[1::2], sections[2::2], strict=True))
    commands = typer.main.get_command(app).commands
    assert listed.keys() == commands.keys()
    for name, command in commands.items():
        for parameter in command.params:
            assert all(option in listed[name] for option in parameter.opts if option.startswith("--")), name


def test_the_reference_of_python_has_the_public_names(site):
    page = (site / "reference" / "python.html").read_text("utf-8")
    for name in ("settings.open_reranker", "reranker.Reranker.rank", "scores.RankedPassage", "errors.RerankError"):
        assert f'id="mistral_rerank.{name}"' in page
    assert 'id="langchain_mistral_rerank.rerank.MistralRerank.compress_documents"' in page
    assert 'id="llama_index_mistral_rerank.rerank.MistralRerank"' in page


@pytest.mark.parametrize(("scheme", "width"), IN.values(), ids=IN)
@pytest.mark.parametrize("path", ["index", "how-to/migrate", "reference/settings"])
def test_pages_are_accessible_and_load_nothing_from_elsewhere(site, browser, path, scheme, width):
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
    )
    page, addresses = context.new_page(), []
    page.on("request", lambda request: addresses.append(request.url))
    page.goto((site / f"{path}.html").as_uri())
    problems = axe.Axe().run(page).response["violations"]
    assert [problem["id"] for problem in problems if problem["impact"] in ("serious", "critical")] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()
    assert all(address.startswith(site.as_uri()) for address in addresses)
