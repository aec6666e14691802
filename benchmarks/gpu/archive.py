"""One archive that travels in parts, with several calls."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

from stages import CARRYING

PART, MANIFEST = "learn.part", "learn.json"


def split(folder: Path, packed: Path, room: dict[int, int]) -> None:
    """Compress a folder, and write a part of it for each call and the checksum for the last one.

    Args:
        folder: what to compress.
        packed: has a folder for each call.
        room: the bytes that each call may still carry.

    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=1) as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, file.name)
    content = buffer.getvalue()
    total = sum(room.values())
    if len(content) > total:
        raise SystemExit(f"the training inputs take {len(content) >> 20} MiB; the calls have room for {total >> 20}")
    start = 0
    for call, free in room.items():
        end = len(content) if call == max(room) else start + len(content) * free // total
        (packed / str(call) / PART).write_bytes(content[start:end])
        start = end
    (packed / str(max(room)) / MANIFEST).write_text(
        json.dumps({"sha256": hashlib.sha256(content).hexdigest()}), "utf-8"
    )


def join(packed: Path, target: Path) -> None:
    """Join the parts, compare the checksum, and extract the archive; nothing if that has been done.

    Raises:
        FileNotFoundError: a part has not arrived.
        ValueError: the parts do not belong together.

    """
    if target.is_dir():
        return
    parts = [packed / str(call) / PART for call in CARRYING]
    for part in parts:
        if not part.is_file():
            raise FileNotFoundError(f"{part} has not arrived: make a call that carries {part.parent} first")
    content = b"".join(part.read_bytes() for part in parts)
    expected = json.loads((packed / str(max(CARRYING)) / MANIFEST).read_text("utf-8"))["sha256"]
    if hashlib.sha256(content).hexdigest() != expected:
        raise ValueError(f"the parts in {packed} do not belong together: pack again and carry all of them")
    partial = target.with_name(f"{target.name}.partial")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:xz") as archive:
        archive.extractall(partial, filter="data")
    partial.rename(target)
