"""The command as its users run it: a process of its own."""

import subprocess
import sys
from pathlib import Path

COMMAND = Path(sys.executable).parent / "mistral-rerank"


def assert_refused(found: subprocess.CompletedProcess[str], hint: str) -> None:
    """A failure is one line that helps, without a traceback, and nothing on stdout."""
    assert found.returncode == 1
    assert hint in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert found.stdout == ""


def run(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *map(str, arguments)], input=stdin, capture_output=True, text=True, check=False, timeout=300
    )
