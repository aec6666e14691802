"""Twenty-four seconds of mixed abuse of a real server: the benchmark itself, smaller."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "server_abuse.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the server's memory from /proc")
def test_after_mixed_abuse_the_server_lives_and_has_answered_rightly(tiny: Path):
    options = ["--model", str(tiny), "--minutes", "0.4", "--warm-up", "0.2", "--rate", "15", "--readiness", "10"]
    found = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=400)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "faults: none" in found.stdout
