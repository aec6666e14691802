"""The sources use nothing that a platform lacks, and no encoding that depends on one."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    file
    for folder in ("core", "langchain_mistral_rerank", "llama_index_mistral_rerank", "examples", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
)
POSIX = {"fcntl", "grp", "pwd", "resource", "termios"}


def unportable(tree):
    """Lines that open text without an encoding, or import what Windows lacks with nothing to catch it."""
    caught = {
        node
        for attempt in ast.walk(tree)
        if isinstance(attempt, ast.Try)
        for line in attempt.body
        for node in ast.walk(line)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in caught:
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            if names & POSIX:
                yield node.lineno
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        named = {keyword.arg for keyword in node.keywords}
        if name == "getpid":
            yield node.lineno
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if "encoding" in named:
            continue
        if (name == "read_text" and not node.args) or (name == "write_text" and len(node.args) < 2):
            yield node.lineno
        if name == "open" and any(mode in ("r", "w", "a", "x", "r+", "w+") for mode in modes):
            yield node.lineno


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_source_is_the_same_on_every_platform(file):
    assert list(unportable(ast.parse(file.read_text("utf-8")))) == []
