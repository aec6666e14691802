"""The recipe `examples/training/mini`: what a training must survive on a card that is lent for minutes."""

import sys
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "examples" / "training" / "mini"


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
