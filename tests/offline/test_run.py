"""Scoring on a real Ray, with tiny weights."""

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import COMMAND
from server.running import LOOPBACK, descendants, free_port, listening, ray_cluster

from mistral_rerank import InvalidInputError, Reranker, RerankSettings, SettingsError
from mistral_rerank.data_files.pairs import score_lines

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'mistral-rerank[cluster]'")
pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'mistral-rerank[cluster]'")
pq = pytest.importorskip("pyarrow.parquet")

from mistral_rerank.offline.run import Totals, Workers, score_on_ray  # noqa: E402

PAIRS = 120
RECORDS = [
    {"query": f"question {number % 5}", "passage": f"passage {number // 3 % 30}", "id": number}
    for number in range(PAIRS)
]


@pytest.fixture
def settings(tiny: Path) -> RerankSettings:
    ray_cluster()
    return RerankSettings(model=str(tiny), device="cpu", dtype="float32")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two files of JSON lines."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, records in (("a.jsonl", RECORDS[:50]), ("b.jsonl", RECORDS[50:])):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def score(settings: RerankSettings, source: Path, out: Path, *, workers: int = 1, **options: object) -> Totals:
    options = {"recorded": {}, "progress": lambda done, total: None, "shard_pairs": 20} | options
    return score_on_ray(settings, str(source), str(out), workers=Workers(workers, cpus=0.1), **options)


def scored(out: Path) -> list[dict[str, object]]:
    """The records of all shards, by their id."""
    records = [json.loads(line) for part in out.glob("part-*.jsonl") for line in part.read_text().splitlines()]
    return sorted(records, key=lambda record: record["id"])


def assert_scored(out: Path, reranker: Reranker) -> None:
    """The shards hold what one process would write, and there is nothing else."""
    expected = list(score_lines(reranker, map(json.dumps, RECORDS), "pairs"))
    found = scored(out)
    assert [record | {"logit": 0, "probability": 0} for record in found] == [
        record | {"logit": 0, "probability": 0} for record in expected
    ]
    for name in ("logit", "probability"):
        assert [record[name] for record in found] == pytest.approx([record[name] for record in expected], abs=1e-5)
    others = {file.name for file in out.iterdir() if not file.name.startswith("part-")}
    assert others == {"_SUCCESS", "_manifest.json"}


def test_the_scores_of_three_workers_are_those_of_one_process(settings, source, tmp_path, tiny_reranker):
    done: list[tuple[int, int]] = []
    totals = score(settings, source, tmp_path / "out", workers=3, progress=lambda *counts: done.append(counts))
    assert_scored(tmp_path / "out", tiny_reranker)
    assert len(list((tmp_path / "out").glob("part-*.jsonl"))) > 3
    scores = tiny_reranker.score_pairs([(record["query"], record["passage"]) for record in RECORDS])
    assert totals == Totals(PAIRS, scored=PAIRS, rejected=0, tokens=sum(score.tokens for score in scores))
    assert done[0] == (0, PAIRS)
    assert done[-1] == (PAIRS, PAIRS)
    with pytest.raises(InvalidInputError, match="holds a complete run"):
        score(settings, source, tmp_path / "out")


def test_columns_of_parquet_files_are_kept(settings, tmp_path, tiny_reranker):
    day = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    records = [record | {"day": day, "tags": ["a", None], "logit": "old"} for record in RECORDS]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "pairs.parquet", row_group_size=30)
    score(settings, tmp_path / "pairs.parquet", tmp_path / "out")
    found = pa.concat_tables(map(pq.read_table, sorted((tmp_path / "out").glob("part-*.parquet")))).sort_by("id")
    assert found.drop_columns(["logit", "probability"]).to_pylist() == [
        {name: value for name, value in record.items() if name != "logit"} for record in records
    ]
    expected = tiny_reranker.score_pairs([(record["query"], record["passage"]) for record in RECORDS])
    assert found["logit"].to_pylist() == pytest.approx([score.logit for score in expected], abs=1e-5)
    assert found["probability"].to_pylist() == pytest.approx([score.probability for score in expected], abs=1e-5)


def test_invalid_rows_are_set_aside_with_their_reasons(settings, source, tmp_path, tiny_reranker):
    with (source / "b.jsonl").open("a") as file:
        file.write('no JSON\n\n{"query": "q"}\n')
    totals = score(settings, source, tmp_path / "out", rejects=str(tmp_path / "rejects.jsonl"))
    assert_scored(tmp_path / "out", tiny_reranker)
    assert (totals.scored, totals.rejected) == (PAIRS, 2)
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    first, second = sorted(rejects, key=lambda reject: reject["line"])
    assert (first["file"], first["line"], first["text"]) == (str(source / "b.jsonl"), 71, "no JSON")
    assert "not JSON" in first["reason"]
    assert second["line"] == 73
    assert "lacks 'passage'" in second["reason"]


def test_an_invalid_row_stops_the_run_before_anything_is_scored(settings, source, tmp_path):
    (source / "c.jsonl").write_text('{"query": " ", "passage": "x"}\n')
    with pytest.raises(InvalidInputError, match=r'c.jsonl:1: "query" is empty$'):
        score(settings, source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("part-*"))


def test_a_parquet_file_without_the_columns_is_refused(settings, tmp_path):
    pq.write_table(pa.table({"question": ["q"], "passage": ["p"]}), tmp_path / "pairs.parquet")
    with pytest.raises(InvalidInputError, match="lacks 'query'; it has 'question', 'passage'"):
        score(settings, tmp_path / "pairs.parquet", tmp_path / "out")


def actors() -> list[int]:
    """The processes of Ray Data's actors."""
    names = {pid: Path(f"/proc/{pid}/cmdline") for pid in descendants(os.getpid())}
    return [pid for pid, name in names.items() if name.exists() and name.read_text().startswith("ray::MapWorker")]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are found as Linux shows them")
def test_a_worker_that_is_killed_is_replaced(settings, source, tmp_path, tiny_reranker):
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        if done and not killed:
            killed.append(actors()[0])
            os.kill(killed[0], signal.SIGKILL)

    totals = score(settings, source, tmp_path / "out", workers=2, progress=kill)
    assert len(killed) == 1
    assert_scored(tmp_path / "out", tiny_reranker)
    assert totals.pairs == PAIRS


KILLED = """
import os, sys
from mistral_rerank import RerankSettings
from mistral_rerank.offline.run import Workers, score_on_ray

def progress(done, total):
    if done >= total / 2:
        os.kill(os.getpid(), 9)

settings = RerankSettings(model=sys.argv[1], device="cpu", dtype="float32")
score_on_ray(settings, *sys.argv[2:], workers=Workers(1, cpus=0.1), recorded={}, progress=progress, shard_pairs=20)
"""


def test_a_run_whose_driver_was_killed_goes_on_and_scores_nothing_again(
    settings, source, tmp_path, tiny, tiny_reranker
):
    out = tmp_path / "out"
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    killed = subprocess.run([sys.executable, "-c", KILLED, tiny, source, out], env=environment, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "_SUCCESS").exists()
    lost, *parts = sorted(out.glob("part-*.jsonl"))
    lost.unlink()  # workers outlive their driver for a moment, and may have written all shards
    done = {part: part.stat().st_mtime_ns for part in parts}
    assert done
    pairs = sum(len(part.read_text().splitlines()) for part in done)
    totals = score(settings, source, out)
    assert totals.pairs == PAIRS
    assert 0 < totals.scored <= PAIRS - pairs
    assert {part: part.stat().st_mtime_ns for part in done} == done
    assert_scored(out, tiny_reranker)


def test_a_run_does_not_go_on_with_other_pairs_or_settings(settings, source, tmp_path):
    out = tmp_path / "out"
    (source / "c.jsonl").write_text("no JSON\n")
    with pytest.raises(InvalidInputError, match="not JSON"):
        score(settings, source, out)
    with pytest.raises(SettingsError, match="another dtype"):
        score(settings, source, out, recorded={"dtype": "float16"})
    (source / "c.jsonl").unlink()
    with pytest.raises(SettingsError, match="another input"):
        score(settings, source, out)


@pytest.mark.parametrize(
    ("names", "says"),
    [((), "no .parquet and no .jsonl file"), (("a.jsonl", "b.parquet"), "both .parquet and .jsonl files")],
)
def test_a_folder_without_pairs_of_one_format_is_refused(names, says, settings, tmp_path):
    (tmp_path / "pairs").mkdir()
    for name in (*names, "_SUCCESS", ".hidden.jsonl"):
        (tmp_path / "pairs" / name).touch()
    with pytest.raises(InvalidInputError, match=says):
        score(settings, tmp_path / "pairs", tmp_path / "out")


def test_an_existing_folder_is_not_written_to(settings, source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(InvalidInputError, match="exists; give another --out"):
        score(settings, source, tmp_path / "out")


@pytest.mark.parametrize("command", [["score", "--cluster", "pairs.jsonl", "--out", "out"], ["serve", "--cluster"]])
def test_a_cluster_that_does_not_answer_is_one_clear_line(command, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(RECORDS[0]))
    environment = os.environ | {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
    done = subprocess.run([COMMAND, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode
    (line,) = done.stderr.strip().splitlines()
    assert "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:" in line
    assert "unset it for a Ray of its own" in line


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="addresses are found as Linux shows them")
def test_the_command_runs_on_a_ray_of_its_own_that_listens_on_loopback_alone(
    tiny, source, tmp_path, tiny_reranker, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", "")  # as good as unset
    options = ["--cluster", "--workers", "1", "--model", tiny, "--device", "cpu", "--dtype", "float32"]
    command = [COMMAND, "score", source, "--out", tmp_path / "out", *options]
    addresses: set[str] = set()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            addresses |= listening(descendants(process.pid))
            time.sleep(0.2)
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert f"{PAIRS} of {PAIRS} pairs were scored by this run" in errors
    assert addresses
    assert addresses <= LOOPBACK
    assert_scored(tmp_path / "out", tiny_reranker)
