"""Stage 3: train mini from prepared groups, and return the newest weights every two minutes.

The training is a process of its own, `mistral-rerank train`. It is stopped before the time is over, so that its last
saved weights return.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import Stage
from stages import PACKED, REPOSITORY

EVERY_SECONDS = 120
LAST_SECONDS = 15
"""Time to stop and to copy the last weights."""
CONTRAST = REPOSITORY / "examples" / "contrast"
MINI = REPOSITORY / "core" / "mistral_rerank" / "mini"
RETURNED = "adapter_model.safetensors", "adapter_config.json", "trainer_state.json"
"""Files of a saved state that return; with `rerank.json` they are a checkpoint."""


def write_config(stage: Stage) -> None:
    """Write how the returned weights are read: like mini, whose calibration does not hold for them."""
    config = json.loads((MINI / "rerank.json").read_text("utf-8"))
    del config["calibration"]
    (stage.out / "rerank.json").write_text(json.dumps(config, indent=2), "utf-8")


def train(stage: Stage, scratch: Path) -> subprocess.Popen[bytes]:
    """Start the training."""
    groups = sorted(PACKED.glob("*/groups/*.jsonl"))
    data = groups if stage.full and groups else [CONTRAST]
    options = ["--init", "mini", "--out", str(scratch / "mini"), "--device", str(stage.device)]
    for source in data:
        options += ["--data", str(source)]
    if stage.full:
        options += ["--groups-per-step", "8", "--groups-per-forward", "1", "--save-steps", "25", "--epochs", "2"]
    else:
        options += ["--groups-per-step", "2", "--groups-per-forward", "1", "--save-steps", "1", "--max-queries", "4"]
    main = "from mistral_rerank.cli import main; main()"
    return subprocess.Popen([sys.executable, "-c", main, "--verbose", "train", *options])


def read_losses(folder: Path) -> list[float]:
    """Read the loss of every step from a saved state, or from the checkpoint of a training that has ended."""
    record = folder / "training.json"
    if record.is_file():
        return list(json.loads(record.read_text("utf-8"))["loss"])
    log = json.loads((folder / "trainer_state.json").read_text("utf-8"))["log_history"]
    return [step["loss"] for step in log if "loss" in step]


def return_newest(stage: Stage, scratch: Path) -> bool:
    """Copy the newest complete state, or the checkpoint of a training that has ended; True if there is one."""
    states = [file.parent for file in scratch.glob("mini.training/checkpoint-*/trainer_state.json")]
    newest = max(states, key=lambda folder: int(folder.name.split("-")[1]), default=None)
    folder = scratch / "mini" if (scratch / "mini").is_dir() else newest
    if folder is None:
        return False
    with stage.results.check(f"weights returned: {folder.name}") as entry, contextlib.suppress(FileNotFoundError):
        for name in RETURNED:  # an older state may be removed while it is copied; the next copy has a newer one
            if (folder / name).is_file():
                shutil.copy(folder / name, stage.out / f"{name}.partial")
                (stage.out / f"{name}.partial").replace(stage.out / name)
        losses = read_losses(folder)
        entry["steps"] = len(losses)
        entry["mean loss of the first and last 20 steps"] = [
            round(sum(some) / len(some), 3) for some in (losses[:20], losses[-20:]) if some
        ]
    return True


def main() -> None:
    """Train until the data or the time is over."""
    stage = Stage("learn")
    write_config(stage)
    with tempfile.TemporaryDirectory() as folder:
        scratch, start = Path(folder), time.monotonic()
        process = train(stage, scratch)
        try:
            while process.poll() is None and stage.seconds_left > LAST_SECONDS:
                wait = min(EVERY_SECONDS, stage.seconds_left - LAST_SECONDS)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, wait))
                if process.poll() is None and stage.seconds_left > LAST_SECONDS:
                    return_newest(stage, scratch)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        with stage.results.check("training") as entry:
            entry["training seconds"] = round(time.monotonic() - start)
            entry["ended by itself"] = process.returncode == 0
            entry["ok"] = return_newest(stage, scratch) and process.returncode in (0, -9)


if __name__ == "__main__":
    main()
