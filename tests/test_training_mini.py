"""The recipe `examples/training/mini`: what a training must survive on a card that is lent for minutes."""

import json
import sys
from pathlib import Path

from command import run_code
from safetensors.torch import load_file

RECIPE = Path(__file__).parent.parent / "examples" / "training" / "mini"
SCRIPT = """
import runpy, sys
del sys.argv[0]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_groups_are_repeated_until_a_later_file_appears(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    monkeypatch.delitem(sys.modules, "rows", raising=False)
    from rows import Steps

    first, later = tmp_path / "pass-0.jsonl", tmp_path / "pass-1.jsonl"
    first.write_text("a\nb\n")
    steps = iter(Steps([first, later], 2))
    assert [sorted(next(steps)) for _ in range(2)] == [["a", "b"], ["a", "b"]]
    later.write_text("c\nd\n")
    assert [sorted(next(steps)) for _ in range(3)] == [["c", "d"], ["c", "d"], ["a", "b"]]


def test_steps_without_a_finite_gradient_leave_the_weights_finite(tiny, tmp_path):
    group = {"queries": ["When?", "Who?"], "passages": ["In May.", "Nobody."], "grades": [[1.0, 0.0], [0.0, 1.0]]}
    lines = [json.dumps(group | {"teacher": [[1.0, value], [0.0, 2.0]]}) for value in (0.0, float("nan"))]
    (tmp_path / "pass-0.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["--base", tiny, "--layers", 3, "--rank", 4, "--groups", tmp_path / "pass-0.jsonl", "--workers", 0]
    arguments += ["--groups-per-step", 1, "--seconds", 100, "--device", "cpu", "--out", tmp_path]
    trained = run_code(SCRIPT, (RECIPE / "train.py").as_posix(), *arguments)
    assert trained.returncode == 1
    assert "21 steps without a finite gradient" in trained.stderr
    assert json.loads((tmp_path / "training.json").read_text())["steps"] in (20, 21)
    weights = load_file(tmp_path / "adapter-0.safetensors") | load_file(tmp_path / "adapter-1.safetensors")
    assert len(weights) == 3 * 7 * 2 + 1
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert all(tensor.any() for tensor in weights.values())
