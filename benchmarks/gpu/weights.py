"""Weights in fewer bytes: a base's lower layers as GGUF, and other models in 8 bits.

python benchmarks/gpu/weights.py base GGUF FOLDER SHA256
python benchmarks/gpu/weights.py models FOLDER

The first converts a GGUF file to a base in the cache; its tensors must have the checksum. The second writes the
safetensors of all models in a folder.
"""

import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mistral_rerank.data_files.atomic import write_json
from mistral_rerank.local.checkpoints import gguf as converter
from mistral_rerank.local.checkpoints.wheels import sha256_of

PACKED = "weights.npz"
BESIDE = "config.json", "tokenizer.json", "norm.json"
"""Files of a model that travel as they are, where it has them."""


def checksum(tensors: dict[str, torch.Tensor], layers: int) -> str:
    """Return the SHA-256 of the names and bytes of the lower layers' tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if _layer(name) < layers:
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def reduce_gguf(source: Path, layers: int, target: Path) -> None:
    """Copy a GGUF file without the upper layers."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = layers if name == f"{architecture}.block_count" else field.contents()
        is_array = field.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(name, value, field.types[0], sub_type=field.types[-1] if is_array else None)
    for tensor in reader.tensors:
        if _layer(tensor.name) < layers:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _layer(name: str) -> int:
    """Return the layer of a tensor, by its name in GGUF or transformers; -1 for a tensor outside of the layers."""
    parts = name.split(".")
    return next((int(part) for part in parts if part.isdecimal()), -1)


def convert_base(gguf: Path, folder: Path, expected: str) -> None:
    """Convert a GGUF file as the package does, and compare the tensors' checksum."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    converter._convert(gguf, partial)
    if checksum(load_file(partial / "model.safetensors"), sys.maxsize) != expected:
        raise ValueError(f"the tensors of {gguf} differ from those of the base that was packed")
    write_json(partial / converter.CHECKSUMS, {file.name: sha256_of(file) for file in partial.iterdir()})
    partial.rename(folder)


def pack_model(source: Path, target: Path) -> None:
    """Write a model's matrices as int8 with a float32 scale for each row, and copy its other files."""
    target.mkdir(parents=True)
    arrays = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        values = tensor.float().numpy()
        if values.ndim == 2:
            scales = np.abs(values).max(1, keepdims=True) / 127 + 1e-12
            arrays[f"int8 {name}"] = np.round(values / scales).astype(np.int8)
            arrays[f"scales {name}"] = scales.astype(np.float32)
        else:
            arrays[f"float32 {name}"] = values
    np.savez(target / PACKED, allow_pickle=False, **arrays)
    for name in BESIDE:
        if (source / name).is_file():
            shutil.copy(source / name, target)


def unpack_model(folder: Path) -> None:
    """Write the safetensors of a packed model, in float32."""
    tensors = {}
    with np.load(folder / PACKED) as arrays:
        for key in arrays:
            kind, name = key.split(" ")
            if kind == "float32":
                tensors[name] = torch.from_numpy(arrays[key])
            elif kind == "int8":
                tensors[name] = torch.from_numpy(arrays[key] * arrays[f"scales {name}"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / PACKED).unlink()


if __name__ == "__main__":
    if sys.argv[1] == "base":
        convert_base(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        for packed in sorted(Path(sys.argv[2]).glob(f"*/{PACKED}")):
            unpack_model(packed.parent)
