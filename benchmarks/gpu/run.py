"""Run the stages of one call, each in a process of its own with a time limit, and print their report.

python3 benchmarks/gpu/run.py CALL --out DIR [--work DIR] [--device auto]

Every stage writes DIR/NAME.json after each check, so a stage that is cut short keeps what it had. What an earlier call
on the same machine has brought stays in the work folder. Full sizes run on CUDA. On every other device sizes are tiny
and time limits `TIMES_OFF_CUDA` as long. Only torch must be installed before.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from report import read, tables
from stages import CALLS, PACKED, REPOSITORY, STAGES, TIMES_OFF_CUDA


def install(work: Path) -> None:
    """Install the wheels, once."""
    site, wheels = work / "site", sorted(PACKED.glob("*/wheels/*.whl"))
    if site.exists():
        return
    if not wheels:
        sys.exit(f"no wheels in {PACKED} and none installed in {work}; start with call 1 on a fresh machine")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--no-cache-dir", "--target", str(site), *map(str, wheels)], check=True)
    version = "0+tree"  # the package is not installed: it reads its version from these files
    metadata = site / f"mistral_rerank-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mistral-rerank\nVersion: {version}\n", "utf-8")


def unpack_base(cache: Path) -> None:
    """Unpack the parts of mini's base that have arrived, into the cache of bases."""
    for archive in sorted(PACKED.glob("*/base.zip")):
        with zipfile.ZipFile(archive) as files:
            if not all((cache / "bases" / name).exists() for name in files.namelist()):
                files.extractall(cache / "bases")


def run_stage(name: str, seconds: float, arguments: list[str], environment: dict[str, str], log: Path) -> str:
    """Run one stage until it ends or its time is over, and return how it ended."""
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *arguments, "--seconds", f"{seconds:.0f}"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"cut off after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                process.wait()
    return "complete" if code == 0 else f"exit code {code}"


def limit_factor(device: str) -> int:
    """Return how many times its limit a stage may take on a device."""
    import torch  # here, since a stage then reads it from the page cache

    on_cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    return 1 if on_cuda else TIMES_OFF_CUDA


def main() -> None:
    """Set up, run the stages and print their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", type=int, choices=CALLS)
    parser.add_argument("--out", type=Path, required=True, help="results are written here")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mistral-rerank-gpu")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # what is printed survives a kill
    start = time.monotonic()
    work, out = options.work.resolve(), options.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    install(work)
    unpack_base(work / "cache")
    paths = [work / "site", REPOSITORY / "core", REPOSITORY, REPOSITORY / "benchmarks"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONUNBUFFERED": "1",
        "MISTRAL_RERANK_CACHE": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    factor, passed = limit_factor(options.device), True
    print(f"set up in {time.monotonic() - start:.0f} s")
    for stage in STAGES:
        if stage.call == options.call:
            start, log = time.monotonic(), out / f"{stage.name}.log"
            arguments = ["--out", str(out), "--device", options.device]
            limit = factor * stage.seconds
            ended = run_stage(stage.name, limit, arguments, environment, log)
            results = read(out, stage.name)
            passed &= ended == "complete" and bool(results) and all(result["ok"] for result in results)
            print(f"\n### {stage.name}: {ended}, {time.monotonic() - start:.0f} of {limit} s\n")
            print(*tables(results), sep="\n")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
