"""What the stages share: their arguments, their results, and the device."""

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mistral_rerank.local.device import pick_device


class Results:
    """The results of a stage, written to a file after each check.

    Args:
        file: JSON, a list of objects with the name of the check, whether it passed, and its values.

    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._entries: list[dict[str, Any]] = []

    @contextmanager
    def check(self, name: str) -> Iterator[dict[str, Any]]:
        """Run a check, which puts its values into the yielded dict, and `ok`. An error fails it, and nothing else."""
        entry: dict[str, Any] = {"name": name, "ok": True}
        start = time.perf_counter()
        try:
            yield entry
        except Exception as error:
            traceback.print_exc()
            entry |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
        entry["seconds"] = round(time.perf_counter() - start, 2)
        self._entries.append(entry)
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self._entries, indent=1), "utf-8")
        partial.replace(self._file)
        print(json.dumps(entry))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Stage:
    """What a stage is given.

    Attributes:
        name: of the stage.
        out: the folder for results.
        device: where to run.
        full: whether to run full sizes, as on CUDA; tiny ones elsewhere.
        deadline: of `time.monotonic`, which all processes share; the stage is killed then.

    """

    def __init__(self, name: str) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--out", type=Path, required=True)
        parser.add_argument("--device", default="auto")
        parser.add_argument("--deadline", type=float, required=True)
        options = parser.parse_args()
        self.name, self.out, self.deadline = name, options.out, options.deadline
        self.device = pick_device(options.device)
        self.full = self.device.type == "cuda"
        self.results = Results(self.out / f"{name}.json")

    def attempt(self, section: Callable[..., None], *arguments: object) -> None:
        """Run a section of several checks; an error outside of them is recorded as one more failed check."""
        try:
            section(self, *arguments)
        except Exception as error:
            with self.results.check(f"{section.__name__} {' '.join(map(str, arguments))}"):
                raise error

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


def synchronize(device: torch.device) -> None:
    """Wait for the work that is queued on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
