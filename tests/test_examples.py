import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_it_stands(example, tmp_path):
    found = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr
    before, total, after = map(int, re.search(r"(\d+) of (\d+) before, (\d+) after", found.stdout).groups())
    assert total == 40
    assert 0 < before < total
    assert 0 < after <= total
