"""Many clients at once, some of which leave, in front of a real server: the benchmark itself, smaller."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "server_load.py"


def test_under_load_every_reply_is_right_and_nothing_is_lost(tiny: Path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--model",
        str(tiny),
        "--requests",
        "128",
        "--clients",
        "64",
        "--leaving",
        "0.1",
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    counts = re.findall(r"(\d+) answered, (\d+) left, 0 wrong, 0 failed", found.stdout)
    assert [int(answered) + int(left) for answered, left in counts] == [128, 128]
    assert all(int(answered) >= 90 for answered, _ in counts)
    apart, shared = (float(size) for size in re.findall(r"([\d.]+) sequences a forward", found.stdout))
    assert shared > apart
