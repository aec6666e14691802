import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.fixture
def folder(tmp_path):
    """The examples as they stand, with ten of the forty questions; test_mini asks all."""
    copy = shutil.copytree(EXAMPLES[0].parent, tmp_path / "examples")
    head, *rows = (copy / "facts" / "qrels" / "test.tsv").read_text("utf-8").splitlines(keepends=True)
    (copy / "facts" / "qrels" / "test.tsv").write_text("".join([head, *rows[10:20]]), "utf-8")
    queries = copy / "facts" / "queries.jsonl"
    queries.write_text("".join(queries.read_text("utf-8").splitlines(keepends=True)[10:20]), "utf-8")
    return copy


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_it_stands(example, folder, tmp_path):
    command = [sys.executable, folder / example.name]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr
    before, total, after = map(int, re.search(r"(\d+) of (\d+) before, (\d+) after", found.stdout).groups())
    assert total == 10
    assert 0 < before < total
    assert 0 < after <= total
