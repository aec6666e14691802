"""The code blocks of the README, extracted and run as they are."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from command import run
from remote.endpoint import Endpoint, expected, speaks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if not language for line in code.splitlines()]
ANSWER = "Water expands as it freezes, so a block of ice is less dense than the liquid around it."


def block_with(module):
    (code,) = [code for code in PYTHON if f"import {module}" in code or f"from {module}" in code]
    return code


every_block = pytest.mark.parametrize(
    "module", ["mistral_rerank", "langchain_mistral_rerank", "llama_index_mistral_rerank"]
)


def lines_printed(module, capsys):
    exec(compile(block_with(module), module, "exec"), {"__name__": "__main__"})
    return [line.partition("  ") for line in capsys.readouterr().out.splitlines()]


@every_block
def test_a_python_block_prints_the_answer_first(module, capsys):
    printed = lines_printed(module, capsys)
    assert len(printed) == 2
    assert printed[0][2] == ANSWER
    assert 1 >= float(printed[0][0]) >= float(printed[1][0]) >= 0


@every_block
def test_the_variables_send_the_same_block_to_an_endpoint(module, capsys, monkeypatch):
    exports = dict(line.removeprefix("export ").split("=") for line in SHELL if line.startswith("export "))
    assert exports == {"MISTRAL_RERANK_BACKEND": "remote", "MISTRAL_RERANK_BASE_URL": "http://nim:8000"}
    passages = re.findall(r'^    "(.*)",$', block_with(module), flags=re.MULTILINE)
    with Endpoint(speaks("nvidia")) as endpoint:
        for name, value in (exports | {"MISTRAL_RERANK_BASE_URL": endpoint.url}).items():
            monkeypatch.setenv(name, value)
        printed = lines_printed(module, capsys)
    assert [text for _, _, text in printed] == [passage.text for passage in expected(passages)][:2]


def test_the_demo_of_the_first_screen_puts_answers_first():
    assert [line.split("#")[0].strip() for line in SHELL[:2]] == ["make demo", "make test"]
    assert "$(BIN)/mistral-rerank demo" in (ROOT / "Makefile").read_text("utf-8")
    found = run("demo")
    assert found.returncode == 0, found.stderr
    firsts = [line for line in found.stdout.splitlines() if line.startswith("1 ")]
    assert [line.count("*") for line in firsts].count(1) >= 2, "of the three questions"


def test_the_command_line_block_ranks_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    position = next(index for index, line in enumerate(SHELL) if line.startswith("printf"))
    subprocess.run(SHELL[position], shell=True, check=True)
    found = run(*shlex.split(SHELL[position + 1])[1:])
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[1].rstrip().endswith("Ice is less dense than water.")


def test_every_block_is_run_here():
    assert len(PYTHON) == 3
    run_here = ("make ", "pip install", "export ", "printf", "mistral-rerank rank")
    assert [line for line in SHELL if not line.startswith(run_here)] == []


def test_the_extras_exist():
    extras = [name for group in re.findall(r"'\.\[([\w,-]+)\]'", README) for name in group.split(",")]
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert extras


def test_the_pictures_are_small_and_load_nothing():
    pictures = [ROOT / path for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)]
    assert {picture.suffix for picture in pictures} == {".svg", ".png"}
    assert all(picture.stat().st_size < 200_000 for picture in pictures)
    svg = next(picture for picture in pictures if picture.suffix == ".svg").read_text("utf-8")
    assert "mistral-rerank&#160;demo" in svg
    assert not re.search(r"url\(['\"]?http|href=|@import|<script", svg)
