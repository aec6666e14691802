"""Stage 4: measure what stage 3 has trained, all data sets side by side.

nDCG@10 of the dev sets, scores of held-out questions of the training sets, for calibration, and an early exit.
"""

import json
import os
import shutil
import sys
import tarfile
import time
from pathlib import Path

from inputs import DATA, INIT
from jobs import Job
from results import Stage
from stages import REPOSITORY

from mistral_rerank import open_reranker
from mistral_rerank.benchmark.timing import kendall_tau
from mistral_rerank.demo import FACTS
from mistral_rerank.evaluation.datasets import load_beir
from mistral_rerank.local.checkpoints.bases import cache_dir

RECIPE = REPOSITORY / "examples" / "training" / "mini"
sys.path.insert(0, str(RECIPE))
from adapter import make_checkpoint  # noqa: E402
from texts import SETS, is_held_out  # noqa: E402

LARGEST_DIFFERENCE = 0.25
"""Between two logits: twice what a plain loop in bfloat16 differs from float32 by on a CPU."""
WITHOUT_HELD_OUT = "quotesum_dev", "dstc9_faq", "fever_eraser"
"""Training sets whose questions or passages are too few or too unlike a search to calibrate on."""
LAST_SECONDS = 12
"""Time to compress the results."""


def same_scores(stage: Stage, checkpoint: Path) -> None:
    """Compare scores on this device in the default dtype with float32 on the CPU."""
    with stage.results.check(f"scores on {stage.device} and in float32 on the CPU") as entry:
        facts = load_beir(FACTS)
        queries, passages = list(facts.queries.values())[:2], list(facts.corpus.values())[: 20 if stage.full else 4]
        pairs = [(query, passage) for query in queries for passage in passages]
        logits = []
        for options in ({"device": "cpu", "dtype": "float32"}, {"device": str(stage.device)}):
            with open_reranker(str(checkpoint), **options) as reranker:
                logits.append([score.logit for score in reranker.score_pairs(pairs)])
        entry["max diff"] = round(max(abs(a - b) for a, b in zip(*logits, strict=True)), 4)
        entry["tau"] = round(kendall_tau(*logits), 4)
        entry["ok"] = entry["max diff"] <= LARGEST_DIFFERENCE


def write_held_out(train: Path, name: str, folder: Path) -> bool:
    """Write a BEIR folder of a training set's held-out questions; False if there are none."""
    texts = load_beir(train / name)
    queries = [key for key in texts.queries if is_held_out(texts.positives(key)[0])]
    if not queries:
        return False
    (folder / "qrels").mkdir(parents=True)
    shutil.copy(train / name / "corpus.jsonl", folder)
    records = [json.dumps({"_id": key, "text": texts.queries[key]}) for key in queries]
    (folder / "queries.jsonl").write_text("\n".join(records) + "\n", "utf-8")
    judged = [f"{key}\t{passage}\t1" for key in queries for passage in texts.positives(key)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged, ""]), "utf-8")
    return True


def start_jobs(stage: Stage, work: Path, inputs: Path, checkpoint: Path) -> list[Job]:
    """Start an evaluation of each dev set and of the held-out questions, and the fit of the early exit."""
    data, environment = inputs / DATA, os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    command = [sys.executable, "-c", "from mistral_rerank.cli import main; main()"]
    model = ["--model", str(checkpoint), "--device", str(stage.device)]
    queries, top_k, few, fewer = ("300", "50", "60", "25") if stage.full else ("2", "4", "2", "2")
    size = ["--top-k", top_k, "--queries"]
    sets = [name for name in SETS if name not in WITHOUT_HELD_OUT]
    held_out = [name for name in sets if write_held_out(data / "train", name, work / "held" / name)]
    arguments = {
        folder.name: ["evaluate", "--data", str(folder), *size, queries] for folder in sorted((data / "dev").iterdir())
    }
    chosen = [part for name in held_out for part in ("--data", str(work / "held" / name))]
    if chosen:
        arguments["held-out"] = ["evaluate", *chosen, *size, few]
    trained = [part for name in SETS for part in ("--data", str(data / "train" / name))]
    fit = ["early-exit", "--layer", "6", "--epochs", "4", "--max-length", "384", "--max-queries", fewer]
    arguments["early-exit"] = [*fit, *trained]
    return [
        Job(name, [*command, *options, *model, "--out", str(work / "out" / name)], work / f"{name}.log", environment)
        for name, options in arguments.items()
    ]


def record(stage: Stage, job: Job, folder: Path) -> None:
    """Record how a job ended, with nDCG@10 before and after."""
    with stage.results.check(job.name) as entry:
        file = folder / "results.json"
        if file.is_file():
            for figures in json.loads(file.read_text("utf-8"))["figures"]:
                before, after = (round(figures[key]["nDCG@10"], 3) for key in ("first_stage", "reranked"))
                entry[f"{figures['name']} ({figures['queries']})"] = f"{before} → {after}"
        if job.is_running:
            raise job.error(f"not done after {job.seconds:.0f} s")
        job.check()


def pack_results(work: Path, file: Path) -> None:
    """Compress logs and results, without the weights, which have been returned."""

    def without_weights(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if entry.name.endswith("adapter_model.safetensors") else entry

    with tarfile.open(file, "w:xz", preset=1) as archive:
        for part in (*work.glob("*.log"), work / "out"):
            archive.add(part, part.name, filter=without_weights)


def main() -> None:
    """Make a checkpoint of the trained weights, and measure it until the time is over."""
    stage = Stage("measure")
    learn, work = cache_dir().parent / "learn", cache_dir().parent / "measure"
    shutil.rmtree(work, ignore_errors=True)
    (work / "out").mkdir(parents=True)
    with stage.results.check("checkpoint") as entry:
        make_checkpoint(learn / "trained", learn / "inputs" / INIT, work / "checkpoint")
    if not entry["ok"]:
        sys.exit(1)
    jobs = start_jobs(stage, work, learn / "inputs", work / "checkpoint")
    try:
        same_scores(stage, work / "checkpoint")
        while any(job.is_running for job in jobs) and stage.seconds_left > LAST_SECONDS:
            time.sleep(0.5)
        for job in jobs:
            record(stage, job, work / "out" / job.name)
    finally:
        for job in jobs:
            job.kill()
    pack_results(work, stage.out / "results.tar.xz")


if __name__ == "__main__":
    main()
