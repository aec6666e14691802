"""Run the stage of a call in a process of its own with a time limit, and print its report.

python3 benchmarks/gpu/run.py CALL --out DIR [--seconds N] [--work DIR] [--device auto]

The stage writes DIR/NAME.json after each check, so a stage that is cut short keeps what it had. What an earlier call on
the same machine has brought stays. Full sizes run on CUDA. On every other device sizes are tiny and time limits
`TIMES_OFF_CUDA` as long. Only torch must be installed before.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import read, tables
from stages import CALLS, PACKED, REPOSITORY, TIMES_OFF_CUDA, call_seconds

END_SECONDS = 3
"""Time to print the results."""


def install(work: Path) -> None:
    """Install the wheels, once."""
    site, wheels = work / "site", sorted(PACKED.glob("*/wheels/*.whl"))
    if site.exists():
        return
    if not wheels:
        sys.exit(f"no wheels in {PACKED} and none installed in {work}; make a call that carries build/gpu/1 first")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--no-cache-dir", "--target", str(site), *map(str, wheels)], check=True)
    version = "0+tree"  # the package is not installed: it reads its version from these files
    metadata = site / f"mistral_rerank-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mistral-rerank\nVersion: {version}\n", "utf-8")


def run_stage(name: str, seconds: float, arguments: list[str], environment: dict[str, str], log: Path) -> str:
    """Run one stage until it ends or its time is over, and return how it ended."""
    deadline = time.monotonic() + seconds
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *arguments, "--deadline", str(deadline)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"cut off after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
    return "complete" if code == 0 else f"exit code {code}"


def limit_factor(device: str) -> int:
    """Return how many times its limit a stage may take on a device."""
    import torch  # here, since a stage then reads it from the page cache

    on_cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    return 1 if on_cuda else TIMES_OFF_CUDA


def main() -> None:
    """Set up, run the stage and print its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", type=int, choices=CALLS)
    parser.add_argument("--out", type=Path, required=True, help="results are written here")
    parser.add_argument("--seconds", type=float, help="of the call; default: as planned")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mistral-rerank-gpu")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # what is printed survives a kill
    start = time.monotonic()
    work, out = options.work.resolve(), options.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    install(work)
    paths = [work / "site", REPOSITORY / "core", REPOSITORY, REPOSITORY / "benchmarks"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONUNBUFFERED": "1",
        "MISTRAL_RERANK_CACHE": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",  # bm25s starts jax, which would take most of the card's memory
    }
    stage, log = CALLS[options.call], out / f"{CALLS[options.call].name}.log"
    seconds = options.seconds or limit_factor(options.device) * call_seconds(options.call)
    limit = seconds - (time.monotonic() - start) - END_SECONDS
    print(f"set up in {time.monotonic() - start:.0f} s")
    start = time.monotonic()
    ended = run_stage(stage.name, limit, ["--out", str(out), "--device", options.device], environment, log)
    results = read(out, stage.name)
    print(f"\n### {stage.name}: {ended}, {time.monotonic() - start:.0f} of {limit:.0f} s\n")
    print(*tables(results), sep="\n")
    if ended != "complete":
        print(f"\n{log.name} ends with:\n{log.read_text('utf-8', errors='replace')[-3000:]}")
    sys.exit(0 if ended == "complete" and results and all(result["ok"] for result in results) else 1)


if __name__ == "__main__":
    main()
