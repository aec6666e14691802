"""The documentation names what exists: links, files, commands, options, settings and environment variables."""

import re
import shlex
from inspect import signature
from pathlib import Path

import pytest
import typer

from langchain_mistral_rerank import MistralRerank as LangChainRerank
from llama_index_mistral_rerank import MistralRerank as LlamaIndexRerank
from mistral_rerank import Reranker
from mistral_rerank._options import PEER_NAMES
from mistral_rerank.cli import app
from mistral_rerank.server.settings import ServerSettings
from mistral_rerank.settings import RerankSettings

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core" / "mistral_rerank"
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), CORE / "mini" / "README.md"]
)
SITE = sorted(ROOT.glob("docs/**/*.md"))
OTHER_VARIABLES = {"API_KEY", "CACHE", "EMBEDDINGS_API_KEY", "CLUSTER_CPUS", "CLUSTER_GPUS", "CLUSTER_MAX_REPLICAS"}
COMMANDS = typer.main.get_command(app).commands
OPTIONS = {
    name: {option for parameter in command.params for option in parameter.opts} for name, command in COMMANDS.items()
}


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def code(page: Path) -> list[str]:
    """The lines of code blocks, continued lines joined, and the code in sentences."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def first_column(page: str, heading: str) -> set[str]:
    """The names in the first column of the tables under a heading."""
    section = prose(ROOT / page).split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| ([^|]*`[^|]*) \|", section, flags=re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


@every_page
def test_relative_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_files_of_the_repository_exist(page):
    for text in code(page):
        for path in re.findall(r"(?<![\w/.-])(?:tests|benchmarks|examples|deploy)/[\w/.-]+", text):
            assert (ROOT / path).exists(), path
        for path in re.findall(r"^local/[\w/]+$", text):
            assert (CORE / path).is_dir() or (CORE / f"{path}.py").is_file(), path


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=page_id)
def test_commands_have_their_options(page):
    for text in code(page):
        match = re.search(r"(?:^|[ /])mistral-rerank +([a-z][a-z-]*)(.*)", text.split(" #")[0])
        words = match.groups() if match else text.split(" ", 1) if text.split(" ")[0] in OPTIONS else None
        if words is None:
            options = re.findall(r"^--[\w-]+", text) if page.name != "vllm.md" else []  # those are vLLM's
            assert set(options) <= set().union(*OPTIONS.values()), text
        else:
            command, rest = words[0], " ".join(words[1:])
            assert command in OPTIONS, text
            assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", rest)) <= OPTIONS[command] | {"--help"}, text


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=page_id)
def test_command_lines_of_blocks_parse(page, tmp_path, monkeypatch):
    """Required arguments are there and values valid, as the command itself reads them."""
    (tmp_path / "wheels").mkdir()  # of air-gapped.md: the one path that must exist
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        match = re.search(r"(?:^|[ /])mistral-rerank ([a-z][a-z-]*)(.*)", line)
        if match and match[1] in COMMANDS:
            arguments = shlex.split(match[2].replace("$'", "'"), comments=True)
            COMMANDS[match[1]].make_context(match[1], arguments)


@every_page
def test_the_package_is_installed_from_a_checkout(page):
    """It is not on PyPI. Only an extra of the installed package may be named as on an index."""
    lines = [text for text in code(page) if re.search(r"pip (?:install|download|wheel)\b.*mistral-rerank\b", text)]
    assert [line for line in lines if not re.search(r"mistral-rerank\[\w+\]'$|--no-index", line)] == []


@every_page
def test_environment_variables_are_read(page):
    known = {name.upper() for name in RerankSettings.model_fields} | OTHER_VARIABLES
    known |= {f"SERVER_{name.upper()}" for name in ServerSettings.model_fields}
    assert set(re.findall(r"MISTRAL_RERANK_([A-Z_]+[A-Z])\b", page.read_text("utf-8"))) <= known


@every_page
def test_lines_of_text_have_at_most_120_characters(page):
    assert [line for line in prose(page).splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_the_table_of_settings_is_complete():
    assert set(RerankSettings.model_fields) <= first_column("README.md", "Settings")


def test_the_table_of_the_adapters_options_is_complete():
    own = (
        LangChainRerank.model_fields.keys() | LlamaIndexRerank.model_fields.keys()
    ) - RerankSettings.model_fields.keys()
    assert first_column("docs/reference/adapters.md", "Options") == own - {"callback_manager"}  # which engines set


@pytest.mark.parametrize("page", ["docs/reference/remote.md", "docs/reference/settings.md"])
def test_notes_on_settings_name_settings(page):
    notes = re.findall(r"^- ((?:`\w+`(?:, )?)+):", prose(ROOT / page), flags=re.MULTILINE)
    assert notes
    assert {name for note in notes for name in re.findall(r"`(\w+)`", note)} <= RerankSettings.model_fields.keys()


@pytest.mark.parametrize("page", SITE, ids=page_id)
def test_links_of_the_site_stay_inside_it(page):
    for link in re.findall(r"\]\(([^)#]+)", prose(page)):
        assert link.startswith("https://") or (page.parent / link).resolve() in SITE, link


def test_the_navigation_has_every_page():
    listed = re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text("utf-8"))
    assert sorted(listed) == [str(page.relative_to(ROOT / "docs")) for page in SITE]


def test_options_of_other_rerankers_lead_to_ours():
    """The tables of the migration guide, compared with the fields and with the suggestions for unknown options."""
    options = {*LangChainRerank.model_fields, *LlamaIndexRerank.model_fields, *signature(Reranker.rank).parameters}
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|$", prose(ROOT / "docs/how-to/migrate.md"), flags=re.MULTILINE)
    rows = [row for row in rows if "`MistralRerank`" not in row[1]]
    assert len(rows) > 20
    for theirs, ours in rows:
        names = set(re.findall(r"`([a-z]\w*)(?:=[^`]*)?`", theirs.split(" of `rerank`")[0]))
        replacements = set(re.findall(r"`([a-z]\w*)(?:=[^`]*)?`", ours))
        if ours.startswith("the same"):
            assert names <= options
        elif not ours.startswith(("none", "the variable")):
            assert re.match(r"`(\w+)", ours)[1] in options
        for name in names & PEER_NAMES.keys():
            assert PEER_NAMES[name] in replacements, name
