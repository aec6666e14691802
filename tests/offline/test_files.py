"""The output folder of a run."""

from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'mistral-rerank[cluster]'")

from mistral_rerank.offline.files import OutputFolder


def test_the_file_of_rejects_is_replaced_as_a_whole(tmp_path: Path):
    folder, rejects = OutputFolder(str(tmp_path / "out")), tmp_path / "rejects.jsonl"
    rejects.write_text("of an earlier run")
    with folder.writing("_rejects/0.jsonl") as sink:
        sink.write(b"row\n")
    (tmp_path / "out/_rejects/1.jsonl").mkdir()
    with pytest.raises(OSError, match="1.jsonl"):
        folder.finish(str(rejects), {})
    assert rejects.read_text() == "of an earlier run"
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["rejects.jsonl"]

    (tmp_path / "out/_rejects/1.jsonl").rmdir()
    folder.finish(str(rejects), {"pairs": 1})
    assert rejects.read_text() == "row\n"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["_SUCCESS"]
