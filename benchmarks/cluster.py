"""Measure `mistral-rerank score --cluster` on this machine against `score` without a cluster.

Speed: mini scores the same pairs without a cluster, then with one worker and with two, of one thread each. All texts
are different, so no computation is shared. A rate is the pairs per second from the first result of each worker to the
last of all, which leaves out the start of Ray and the loading of the models.

OMP_NUM_THREADS=1 python benchmarks/cluster.py speed [--pairs 1000] [--model mini]

Kills: two workers score pairs with tiny random weights. A worker is killed after a third of the shards, and the driver
after two thirds; then the same command resumes. The output is compared with that of `score`.

OMP_NUM_THREADS=1 python benchmarks/cluster.py kills [--pairs 200000]
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from full_size import write_checkpoint

from mistral_rerank.data_files.pairs import score_file
from mistral_rerank.demo import FACTS
from mistral_rerank.evaluation.datasets import load_beir
from mistral_rerank.settings import open_reranker

WORKERS = 2
SHARD_PAIRS = 50
"""Of the speed: at the end a worker waits for the other for less than a shard's time."""
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 2000,
}


def write_pairs(file: Path, count: int, *, words: int, sharing: int) -> None:
    """Write random pairs, of which so many share a passage; one in a hundred comes twice if they do."""
    seeded = random.Random(0)
    known = " ".join(load_beir(FACTS).corpus.values()).split()
    passages = [" ".join(seeded.choices(known, k=words)) for _ in range(-(-count // sharing))]
    records = [{"query": " ".join(seeded.choices(known, k=8)), "passage": passages[n // sharing]} for n in range(count)]
    if sharing > 1:
        records[::100] = records[1::100]
    seeded.shuffle(records)
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record | {"id": number}) + "\n" for number, record in enumerate(records))


def rate(marks: list[tuple[int, float]], workers: int = 1) -> float:
    """Give the pairs per second after the first results, one of each worker: the pairs of those were begun before."""
    results = [mark for mark in marks if mark[0]]
    (first, start), (last, end) = results[workers - 1], results[-1]
    return (last - first) / (end - start)


def score_alone(model: str, pairs: Path, out: Path) -> float:
    """Score without a cluster; give the rate."""
    marks: list[tuple[int, float]] = [(0, 0.0)]
    with open_reranker(model, device="cpu", dtype="float32") as reranker, pairs.open(encoding="utf-8") as lines:
        score_file(
            reranker,
            lines,
            pairs.name,
            out,
            settings={},
            progress=lambda count: marks.append((marks[-1][0] + count, time.perf_counter())),
        )
    return rate(marks)


def score_on_cluster(model: str, pairs: Path, out: Path, workers: int, shard_pairs: int | None) -> None:
    """Score on a Ray of its own, and print the rate."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray listens on loopback alone
    from mistral_rerank.offline.run import SHARD_PAIRS as DEFAULT
    from mistral_rerank.offline.run import Workers, score_on_ray
    from mistral_rerank.settings import RerankSettings

    marks: list[tuple[int, float]] = []
    score_on_ray(
        RerankSettings(model=model, device="cpu", dtype="float32"),
        str(pairs),
        str(out),
        workers=Workers(workers),
        recorded={},
        progress=lambda done, _: marks.append((done, time.perf_counter())),
        shard_pairs=shard_pairs or DEFAULT,
    )
    print(rate(marks, workers))


def driver(*arguments: object) -> subprocess.Popen[str]:
    """Start a process that scores on a cluster."""
    command = [sys.executable, __file__, "drive", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def measure_speed(folder: Path, model: str, count: int) -> None:
    """Print the rates."""
    write_pairs(folder / "pairs.jsonl", count, words=30, sharing=1)
    alone = score_alone(model, folder / "pairs.jsonl", folder / "alone.jsonl")
    print(f"{model}, {count} pairs, one thread a worker\n{'score':12} {alone:8.2f} pairs/s", flush=True)
    rates = {}
    for workers in (1, WORKERS):
        arguments = (model, folder / "pairs.jsonl", folder / f"on {workers}", workers, SHARD_PAIRS)
        output, _ = driver(*arguments).communicate()
        rates[workers] = float(output.splitlines()[-1])
        largest = compare(folder / "alone.jsonl", folder / f"on {workers}")
        ratio = f"each {rates[workers] / workers / alone:.2f} of score; logits differ by at most {largest:.1g}"
        print(f"{workers} worker(s)  {rates[workers]:8.2f} pairs/s, {ratio}", flush=True)
    print(f"{WORKERS} workers against 1: {rates[WORKERS] / rates[1]:.2f}")


def records(files: Iterable[Path]) -> dict[int, dict[str, object]]:
    """Read scored records by their id."""
    lines = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    by_id = {record["id"]: record for record in lines}
    assert len(by_id) == len(lines), "records came twice"
    return by_id


def compare(alone: Path, shards: Path) -> float:
    """Check that both hold the same records; give the largest difference of their logits."""
    one, other = records([alone]), records(shards.glob("part-*.jsonl"))
    assert one.keys() == other.keys(), f"{len(one)} and {len(other)} records"
    for name in ("query", "passage"):
        assert all(record[name] == other[number][name] for number, record in one.items())
    return max(abs(record["logit"] - other[number]["logit"]) for number, record in one.items())


def wait_for(parts: int, out: Path, process: subprocess.Popen[str]) -> dict[Path, int]:
    """Wait until there are so many shards; give the time of each."""
    while len(done := list(out.glob("part-*.jsonl"))) < parts:
        assert process.poll() is None, "the driver ended"
        time.sleep(0.1)
    return {part: part.stat().st_mtime_ns for part in done}


def workers_of(pid: int) -> list[int]:
    """Find the actors among the descendants of a process."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for file in files for child in file.read_text("utf-8").split()]
    names = {child: Path(f"/proc/{child}/cmdline").read_text("utf-8") for child in children}
    own = [child for child, name in names.items() if name.startswith("ray::MapWorker")]
    return own + [worker for child in children for worker in workers_of(child)]


def kill_and_resume(folder: Path, count: int) -> None:
    """Score with kills, and print what comes of it."""
    model, pairs, out = folder / "tiny", folder / "pairs.jsonl", folder / "shards"
    model.mkdir()
    write_checkpoint(str(model), "float32", **TINY)
    write_pairs(pairs, count, words=20, sharing=10)
    shards = count // 4096
    first = driver(model, pairs, out, WORKERS)
    wait_for(shards // 3, out, first)
    worker = workers_of(first.pid)[0]
    os.kill(worker, signal.SIGKILL)
    print(f"killed worker {worker} with {len(list(out.glob('part-*')))} shards done", flush=True)
    wait_for(2 * shards // 3, out, first)
    first.kill()
    first.wait()
    done = {part: part.stat().st_mtime_ns for part in out.glob("part-*.jsonl")}
    print(f"killed driver {first.pid} with {len(done)} shards done", flush=True)
    second = driver(model, pairs, out, WORKERS)
    assert second.wait() == 0
    parts = list(out.glob("part-*.jsonl"))
    assert {part: part.stat().st_mtime_ns for part in done} == done, "shards were scored again"
    print(f"resumed: {len(parts)} shards, of which {len(done)} were not written again", flush=True)
    score_alone(str(model), pairs, folder / "alone.jsonl")
    print(f"{count} pairs, logits differ from those of score by at most {compare(folder / 'alone.jsonl', out):.1g}")


def main() -> None:
    """Measure what the first argument says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("speed")
    speed.add_argument("--model", default="mini")
    speed.add_argument("--pairs", type=int, default=1000)
    kills = commands.add_parser("kills")
    kills.add_argument("--pairs", type=int, default=200_000)
    drive = commands.add_parser("drive")  # for this script itself
    drive.add_argument("model")
    drive.add_argument("pairs", type=Path)
    drive.add_argument("out", type=Path)
    drive.add_argument("workers", type=int)
    drive.add_argument("shard_pairs", type=int, nargs="?")
    options = parser.parse_args()
    if options.command == "drive":
        score_on_cluster(options.model, options.pairs, options.out, options.workers, options.shard_pairs)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if options.command == "speed":
            measure_speed(Path(scratch), options.model, options.pairs)
        else:
            kill_and_resume(Path(scratch), options.pairs)


if __name__ == "__main__":
    main()
