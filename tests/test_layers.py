"""The layout: imports point one way, and no module is part of a cycle."""

import ast
from pathlib import Path

import pytest

import mistral_rerank

ROOT = Path(mistral_rerank.__file__).parent
LAYERS = (
    {"_deadline", "_forks", "_options", "_version", "errors", "ray_connection", "sentences"},
    {"_telemetry", "blending", "data_files", "diversity", "inputs", "reranker", "scores", "templates"},
    {"protocols"},
    {"local", "remote"},
    {"settings"},
    {"_holder", "_sharing", "evaluation", "pair_scorer"},
    {"calibration", "demo"},
    {"benchmark", "training"},
    {"adapters", "offline", "server"},
    {"cli"},
)
"""Each layer imports itself and those before it; "local" and "remote", or "benchmark" and "training", not each other."""
LAYER_OF = {part: number for number, layer in enumerate(LAYERS) for part in layer}
APART = (
    {"local", "remote"},
    {"benchmark", "training"},
    {"adapters", "offline"},
    {"adapters", "server"},
    {"offline", "server"},
)


def module_name(file: Path) -> str:
    return ".".join(["mistral_rerank", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module_name(file): file for file in ROOT.rglob("*.py")}


def imports(module: str) -> set[str]:
    """Every import of the package, those inside functions and for type checkers included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mistral_rerank":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found - {module}


IMPORTS = {module: imports(module) for module in MODULES}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"mistral_rerank"}))
def test_a_module_imports_from_its_own_layer_and_below(module):
    part = module.split(".")[1]
    for other in IMPORTS[module]:
        assert other != "mistral_rerank", "import the module that defines the name"
        other_part = other.split(".")[1]
        assert LAYER_OF[other_part] <= LAYER_OF[part], other
        assert other_part == part or {part, other_part} not in APART, other


def test_no_module_is_part_of_a_cycle():
    remaining = dict(IMPORTS)
    while free := {module for module, others in remaining.items() if not others & remaining.keys()}:
        remaining = {module: others for module, others in remaining.items() if module not in free}
    assert sorted(remaining) == []
