"""Processes that a stage starts and watches."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

STOP_SECONDS = 10
"""Time to end after SIGTERM."""


class JobError(Exception):
    """A process failed, took too long, or made no progress; the message has the end of its log."""


class Job:
    """A process that writes a log.

    Args:
        name: for errors.
        command: what to run.
        log: what it prints is appended here.
        environment: of the process.

    """

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name, self.log = name, log
        self._start = time.monotonic()
        with log.open("ab") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def check(self) -> None:
        """Raise JobError if the process has failed."""
        if self._process.poll() not in (None, 0):
            raise self.error(f"exit code {self._process.returncode}")

    def wait(self, seconds: float) -> None:
        """Wait until the process has ended; JobError if it fails or is not done in time."""
        try:
            self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            raise self.error(f"not done after {self.seconds:.0f} s") from None
        self.check()

    def error(self, what: str) -> JobError:
        """Return an error about the process."""
        return JobError(f"{self.name}: {what}; {self.tail(300)}")

    def tail(self, characters: int) -> str:
        """Return the end of the log."""
        return self.log.read_text("utf-8", errors="replace")[-characters:].strip()

    def stop(self) -> None:
        """End the process, by SIGKILL if SIGTERM does not."""
        if not self.is_running:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
