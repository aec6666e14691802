"""Stage 3: train mini, from texts to weights: embeddings, groups, training (`examples/training/mini`).

Every step is a process with a deadline. If one fails, is late or makes no progress, the stage ends at once. What
training has saved by then is in the results: it saves every minute.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import archive
from inputs import DATA, GGUF, INIT, TEACHERS, Base
from jobs import STOP_SECONDS, Job
from results import Stage
from stages import PACKED, REPOSITORY, TIMES_OFF_CUDA

from mistral_rerank.local.checkpoints.bases import cache_dir

RECIPE = REPOSITORY / "examples" / "training" / "mini"
PASSES = 4
EMBED_SECONDS = 120
"""For 70,000 questions and 113,000 passages, which took 39 s on an H200."""
GROUPS_SECONDS = 120
"""For the groups of the first pass, by estimate a third of it."""
STALL_SECONDS = 60
"""Training prints a line every five seconds."""
LAST_SECONDS = 30
"""Time to start training, for its last step, to save the weights and to end. A half of it is there to stop it."""
SAVED = "adapter-0.safetensors", "adapter-1.safetensors", "training.json"


class Training:
    """The steps of the recipe. Inputs, base and embeddings of an earlier try on the machine are used again.

    Args:
        stage: where results go, and the time.
        work: the folder for everything that does not return.

    """

    def __init__(self, stage: Stage, work: Path) -> None:
        self._stage, self._work, self._inputs = stage, work, work / "inputs"
        self._factor = 1 if stage.full else TIMES_OFF_CUDA
        self._last = LAST_SECONDS * self._factor
        self._jobs: list[Job] = []
        self._groups = [work / "groups" / f"pass-{number}.jsonl" for number in range(PASSES if stage.full else 2)]

    def _start(self, name: str, script: Path, *arguments: object, log: str) -> Job:
        command, environment = [sys.executable, str(script), *map(str, arguments)], dict(os.environ)
        if name == "groups":
            command = ["nice", *command]  # later passes are built during training, which needs the cores more
            environment |= {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
        job = Job(name, command, self._stage.out / log, environment)
        self._jobs.append(job)
        return job

    def prepare(self) -> Path:
        """Convert the base while all texts are embedded; return the folder of the base."""
        weights = Path(__file__).with_name("weights.py")
        self._start("teachers", weights, "models", self._inputs / TEACHERS, log="data.log").wait(60 * self._factor)
        packed = Base.read(self._inputs)
        base = cache_dir() / "bases" / packed.folder
        if not base.exists():
            self._start("base", weights, "base", self._inputs / GGUF, base, packed.sha256, log="data.log")
        embeddings = self._work / "embeddings"
        partial = self._work / "embeddings.partial"
        if not embeddings.exists():
            texts = self._inputs / DATA / "train", self._inputs / TEACHERS, partial
            self._start("embed", RECIPE / "embed.py", *texts, self._stage.device, log="data.log")
        limit = time.monotonic() + EMBED_SECONDS * self._factor
        for job in self._jobs:
            job.wait(min(limit - time.monotonic(), self._stage.seconds_left - self._last))
        if not embeddings.exists():
            partial.rename(embeddings)
        return base

    def train(self, base: Path) -> None:
        """Build groups, and train on them from the first pass on, until the time is over."""
        workers = () if self._stage.full else ("--workers", 2)
        groups = self._start(
            "groups",
            RECIPE / "groups.py",
            self._inputs / DATA / "train",
            self._work / "embeddings",
            self._work / "groups",
            *("--passes", len(self._groups), *workers),
            log="data.log",
        )
        options: list[object] = ["--base", base, "--init", self._inputs / INIT, "--out", self._stage.out]
        options += [part for file in self._groups for part in ("--groups", file)]
        options += ["--seconds", round(self._stage.seconds_left - self._last), "--device", self._stage.device]
        if not self._stage.full:
            options += ["--groups-per-step", 1, "--micro-tokens", 2048, "--workers", 1]
        training = self._start("train", RECIPE / "train.py", *options, log="train.log")
        grown, size = time.monotonic(), 0
        while training.is_running:
            if not self._groups[0].exists():
                grown = time.monotonic()
                groups.check()
                if groups.seconds > GROUPS_SECONDS * self._factor:
                    raise groups.error(f"no groups after {groups.seconds:.0f} s")
            if training.log.stat().st_size > size:
                grown, size = time.monotonic(), training.log.stat().st_size
            if time.monotonic() - grown > STALL_SECONDS * self._factor:
                raise training.error(f"no progress for {time.monotonic() - grown:.0f} s")
            if self._stage.seconds_left < STOP_SECONDS + 5:
                raise training.error("not done in time")
            time.sleep(0.25)
        training.check()
        groups.check()

    def stop(self) -> None:
        """End what runs; training saves its weights first. Keep them for the next call."""
        for job in reversed(self._jobs):
            job.stop()
        (self._work / "trained").mkdir(exist_ok=True)
        for name in SAVED:
            if (self._stage.out / name).is_file():
                shutil.copy(self._stage.out / name, self._work / "trained")


def main() -> None:
    """Train until the time is over."""
    stage = Stage("learn")
    work = cache_dir().parent / "learn"
    work.mkdir(parents=True, exist_ok=True)
    with stage.results.check("inputs unpacked") as entry:
        archive.join(PACKED, work / "inputs")
    if not entry["ok"]:
        sys.exit(1)
    training = Training(stage, work)
    try:
        with stage.results.check("embeddings and base") as entry:
            base = training.prepare()
        if not entry["ok"]:
            sys.exit(1)
        with stage.results.check("training") as entry:
            try:
                training.train(base)
            finally:
                training.stop()
                if (stage.out / "training.json").is_file():
                    record = json.loads((stage.out / "training.json").read_text("utf-8"))
                    entry |= {name: record[name] for name in ("steps", "tokens", "pairs")}
                    entry["tokens/s"] = round(record["tokens"] / record["seconds"])
                    entry["first and last losses"] = [*record["losses"][:3], *record["losses"][-3:]]
        sys.exit(0 if entry["ok"] else 1)
    finally:
        training.stop()


if __name__ == "__main__":
    main()
