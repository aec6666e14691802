"""Pack what a GPU machine without a network lacks: build/gpu/1, build/gpu/2 and build/gpu/3, one for each call.

python benchmarks/gpu/pack.py [--python 3.12]
    [--data FOLDER --teacher minilm=FOLDER --teacher e5=FOLDER --init ADAPTER]

Wheels go with the first call. The options pack the inputs of training too, one archive in three parts. The working tree
travels with every call. The last lines are the calls to make.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import archive
from stages import CALLS, CARRYING, PACKED, REPOSITORY, call_seconds

LIMIT = 64 * 2**20
"""The most bytes of one transfer."""
SLACK = 2**19
"""Bytes that stay free, for what the transfer adds."""
REQUIREMENTS = [
    "pydantic",
    "fastapi",
    "uvicorn",
    "platformdirs",
    "pytest-asyncio",
    "bm25s",
    "PyStemmer",
    "gguf",
    "pytrec-eval-terrier",
]
"""What the stages need besides `machine.txt`; these bring what they need themselves."""
PLATFORMS = "manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64"


def canonical(name: str) -> str:
    """Return the name of a package as an index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pack_wheels(folder: Path, python: str) -> None:
    """Download the wheels of `REQUIREMENTS`, with what they need, except what is on the machine."""
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    target += [option for platform in PLATFORMS for option in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    report = folder.with_suffix(".json")
    resolve = ["install", "--dry-run", "--ignore-installed", "--report", str(report), "--target", str(folder)]
    subprocess.run([*pip, *resolve, *target, *REQUIREMENTS], check=True)
    there = set(Path(__file__).with_name("machine.txt").read_text("utf-8").split())
    packages = [entry["metadata"] for entry in json.loads(report.read_text("utf-8"))["install"]]
    report.unlink()
    lacking = [f"{item['name']}=={item['version']}" for item in packages if canonical(item["name"]) not in there]
    subprocess.run([*pip, "download", "--no-deps", "--dest", str(folder), *target, *lacking], check=True)


def tree_bytes() -> int:
    """Count the bytes of the files that travel with every call: tracked, or neither tracked nor ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    ).stdout
    files = {REPOSITORY / os.fsdecode(name) for name in listed.split(b"\0") if name}
    return sum(file.stat().st_size for file in files if file.is_file())


def folder_bytes(folder: Path) -> int:
    """Count the bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="the version of Python on the machine")
    parser.add_argument("--data", type=Path, help="a folder with data sets in its folders train and dev")
    parser.add_argument("--teacher", action="append", default=[], metavar="NAME=FOLDER", help="a BertModel; repeatable")
    parser.add_argument("--init", type=Path, help="the adapter that training starts from")
    options = parser.parse_args()
    options.teachers = {name: Path(folder) for name, _, folder in (text.partition("=") for text in options.teacher)}
    given = options.data, options.teachers, options.init
    if any(given) and not all(given):
        parser.error("training needs --data, --teacher and --init")
    if any(given) and sorted(options.teachers) != ["e5", "minilm"]:
        parser.error(f"the teachers are {sorted(options.teachers)}, expected e5 and minilm")
    return options


def main() -> None:
    """Pack, check the sizes and print the calls."""
    options = parse()
    shutil.rmtree(PACKED, ignore_errors=True)
    for call in CARRYING:
        (PACKED / str(call)).mkdir(parents=True)
    pack_wheels(PACKED / "1" / "wheels", options.python)
    tree, calls = tree_bytes(), [1, 2]
    if options.data:
        from inputs import write_inputs

        calls = list(CALLS)
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(Path(folder), options.data, options.teachers, options.init)
            room = {call: LIMIT - SLACK - tree - folder_bytes(PACKED / str(call)) for call in CARRYING}
            archive.split(Path(folder), PACKED, room)
    print(f"working tree {tree / 2**20:.1f} MiB, at most {LIMIT / 2**20:.0f} MiB a call")
    for call in calls:
        size = folder_bytes(PACKED / str(call))
        print(
            f"call {call}: {size / 2**20:.1f} MiB, {(tree + size) / 2**20:.1f} with the tree\n"
            f"    carry: {(PACKED / str(call)).relative_to(REPOSITORY) if size else 'nothing'}\n"
            f"    timeout: {call_seconds(call) + 5} s\n"
            f"    command: python3 benchmarks/gpu/run.py {call} --out $OUT"
        )


if __name__ == "__main__":
    main()
