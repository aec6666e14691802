"""The scripts of benchmarks and examples import names that exist, from their neighbours and from the package."""

import ast
from pathlib import Path

import pytest

import mistral_rerank

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(file for folder in ("benchmarks", "examples") for file in (ROOT / folder).rglob("*.py"))
PUBLIC = {"mistral_rerank": set(mistral_rerank.__all__)}


def module_file(script, module):
    folders = [script.parent, ROOT / "benchmarks", ROOT / "examples" / "training" / "mini", ROOT / "core"]
    files = [folder / module.replace(".", "/") for folder in folders]
    candidates = [candidate for file in files for candidate in (file.with_suffix(".py"), file / "__init__.py")]
    return next((file for file in candidates if file.exists()), None)


def names_of(file):
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names | {path.stem for path in file.parent.iterdir() if file.name == "__init__.py"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_imported_names_exist(script):
    missing = []
    for node in ast.walk(ast.parse(script.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and (file := module_file(script, node.module)):
            known = PUBLIC.get(node.module) or names_of(file)
            missing += [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in known]
    assert not missing
