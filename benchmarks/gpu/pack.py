"""Pack what a GPU machine without a network lacks: one folder for each call, build/gpu/1, build/gpu/2 and build/gpu/3.

python benchmarks/gpu/pack.py [--groups FILE.jsonl ...] [--python 3.12]

Wheels go with the first call, training groups with the last, and mini's base in three parts, one with each. The working
tree travels with every call. The last lines are the calls to make.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from stages import CALLS, PACKED, REPOSITORY, call_seconds

LIMIT = 64 * 2**20
"""The most bytes of one transfer."""
COMPRESSION = 0.68
"""The compressed size of the base's tensors over their own."""
REQUIREMENTS = [
    "pydantic",
    "fastapi",
    "uvicorn",
    "platformdirs",
    "pytest-asyncio",
    "bm25s",
    "PyStemmer",
    "langchain-core",
    "llama-index-core",
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


def pack_base(parts: list[Path], room: list[int]) -> None:
    """Write the layers of mini's base that are used as shards of bfloat16 safetensors, one in each part, compressed.

    Args:
        parts: the folders.
        room: bytes that each may still take; each tensor goes to the part with the most room.

    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    from mistral_rerank.local.checkpoints.loading import open_checkpoint

    checkpoint = open_checkpoint("mini")
    base = checkpoint.base
    if base is None:
        raise SystemExit("mini is a whole model; pack its folder instead of a base")
    config = json.loads((base / "config.json").read_text("utf-8"))
    layers = checkpoint.layers or config["num_hidden_layers"]
    with safe_open(base / "model.safetensors", "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys() if _layer(name) < layers}  # noqa: SIM118
    shards, left = [{} for _ in parts], list(room)
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        emptiest = left.index(max(left))
        shards[emptiest][name] = tensor.contiguous()
        left[emptiest] -= round(COMPRESSION * tensor.nbytes)
    weight_map, checksums = {}, {}
    for number, (part, shard) in enumerate(zip(parts, shards, strict=True), start=1):
        file = part / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(shard, file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file.name)
        checksums[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        with zipfile.ZipFile(part / "base.zip", "w", zipfile.ZIP_BZIP2) as archive:
            archive.write(file, f"{base.name}/{file.name}")
            if part is parts[-1]:
                index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
                others = {other.name: other.read_bytes() for other in base.iterdir() if other.name.startswith("token")}
                others |= {"config.json": json.dumps(config | {"num_hidden_layers": layers}).encode()}
                others |= {"model.safetensors.index.json": index}
                checksums |= {name: hashlib.sha256(content).hexdigest() for name, content in others.items()}
                others["checksums.json"] = json.dumps(checksums).encode()  # a converted base has them in the cache
                for name, content in others.items():
                    archive.writestr(f"{base.name}/{name}", content)
        file.unlink()


def _layer(name: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


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


def main() -> None:
    """Pack, check the sizes and print the calls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=Path, action="append", help="training groups; default: examples/contrast")
    parser.add_argument("--python", default="3.12", help="the version of Python on the machine")
    options = parser.parse_args()
    shutil.rmtree(PACKED, ignore_errors=True)
    folders = [PACKED / str(call) for call in CALLS]
    for folder in folders:
        folder.mkdir(parents=True)
    pack_wheels(folders[0] / "wheels", options.python)
    for file in options.groups or ():
        target = folders[-1] / "groups"
        target.mkdir(exist_ok=True)
        shutil.copy(file, target / file.name)
    tree, too_large = tree_bytes(), []
    pack_base(folders, [LIMIT - tree - folder_bytes(folder) for folder in folders])
    print(f"working tree {tree / 2**20:.1f} MiB, at most {LIMIT / 2**20:.0f} MiB a call")
    for call, folder in zip(CALLS, folders, strict=True):
        size = folder_bytes(folder)
        too_large += [str(call)] if tree + size > LIMIT else []
        print(
            f"call {call}: {size / 2**20:.1f} MiB, {(tree + size) / 2**20:.1f} with the tree\n"
            f"    carry: {folder.relative_to(REPOSITORY)}\n"
            f"    timeout: {call_seconds(call)} s\n"
            f"    command: python3 benchmarks/gpu/run.py {call} --out $OUT"
        )
    if too_large:
        sys.exit(f"call {', '.join(too_large)} is over the limit")


if __name__ == "__main__":
    main()
