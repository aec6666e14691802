"""The command as its users run it: a process of its own."""

import subprocess
import sys
from pathlib import Path

COMMAND = Path(sys.executable).parent / "mistral-rerank"


def run(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *map(str, arguments)], input=stdin, capture_output=True, text=True, check=False, timeout=300
    )
