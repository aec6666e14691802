"""Embed all texts of the training sets with both teachers.

python embed.py DATA TEACHERS OUT [DEVICE]

TEACHERS has the folders that `teachers.py` writes. On a GPU the models run in float16.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from texts import TEACHERS, Kind, Vectors, all_texts
from tokenizers import Tokenizer
from transformers import BertModel

from mistral_rerank.local.device import multiplies_bfloat16

PREFIXES: dict[str, dict[Kind, str]] = {
    "minilm": {"questions": "", "passages": ""},
    "e5": {"questions": "query: ", "passages": "passage: "},
}
MOST_TOKENS = 256
"""Longer texts are truncated."""
BATCH_TOKENS = {"cuda": 131_072, "cpu": 4096}
"""The most tokens of a batch, with padding."""
MULTIPLE = 16
"""Rows are padded to a multiple of so many tokens."""


class Teacher:
    """A bi-encoder: the mean of the last hidden states, with length 1.

    Args:
        folder: of the model, as `teachers.py` writes it.
        device: where to compute: on a GPU in float16, on a CPU in bfloat16 if it multiplies that, else in float32.

    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        on_cpu = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
        dtype = torch.float16 if device.type == "cuda" else on_cpu
        self._model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval().to(device, dtype)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MOST_TOKENS)
        self._prefixes, self._most = PREFIXES[folder.name], BATCH_TOKENS[device.type]
        self._replacements: dict[int, str] | None = None
        if (folder / "norm.json").is_file():
            norm = json.loads((folder / "norm.json").read_text("utf-8"))["norm"]
            self._replacements = {int(point): text for point, text in norm.items()}

    @torch.inference_mode()
    def embed(self, kind: Kind, texts: list[str]) -> NDArray[np.float16]:
        """Return (texts, hidden) float16."""
        whole = [self._prefixes[kind] + self._normalized(text) for text in texts]
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(whole)]
        vectors = np.zeros((len(ids), self._model.config.hidden_size), np.float16)
        for rows in self._batches([len(tokens) for tokens in ids]):
            padded = torch.zeros(len(rows), _width(len(ids[rows[-1]])), dtype=torch.int64)
            mask = torch.zeros_like(padded)
            for row, index in enumerate(rows):
                padded[row, : len(ids[index])] = torch.tensor(ids[index])
                mask[row, : len(ids[index])] = 1
            mask = mask.to(self._model.device)
            states = self._model(input_ids=padded.to(mask.device), attention_mask=mask).last_hidden_state
            means = (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            vectors[rows] = torch.nn.functional.normalize(means, dim=-1).half().cpu().numpy()
        return vectors

    def _normalized(self, text: str) -> str:
        """Replace code points as the teacher's `norm.json` says, if it has one."""
        return text if self._replacements is None else re.sub("  +", " ", text.translate(self._replacements))

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Divide texts into batches, the shortest first."""
        rows: list[int] = []
        for index in sorted(range(len(lengths)), key=lengths.__getitem__):
            if rows and (len(rows) + 1) * _width(lengths[index]) > self._most:
                yield rows
                rows = []
            rows.append(index)
        if rows:
            yield rows


def _width(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


class EmbeddingsOnDemand:
    """The vectors of the texts that are asked for, computed once.

    Args:
        folder: of the teachers.

    """

    def __init__(self, folder: Path) -> None:
        self._teachers = [Teacher(folder / name, torch.device("cpu")) for name in TEACHERS]
        self._known: dict[tuple[Kind, str], NDArray[np.float16]] = {}

    def of(self, kind: Kind, texts: list[str]) -> Vectors:
        """Return (2, texts, 384) float32."""
        if new := [text for text in dict.fromkeys(texts) if (kind, text) not in self._known]:
            vectors = np.stack([teacher.embed(kind, new) for teacher in self._teachers], 1)
            self._known |= {(kind, text): vector for text, vector in zip(new, vectors, strict=True)}
        return np.stack([self._known[kind, text] for text in texts], 1).astype(np.float32)


def main() -> None:
    """Write the texts and their vectors."""
    data, teachers, out = map(Path, sys.argv[1:4])
    device = torch.device(sys.argv[4] if len(sys.argv) > 4 else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in train.py
    start = time.monotonic()
    questions, passages = all_texts(data)
    (out / "questions.json").write_text(json.dumps(questions), "utf-8")
    (out / "passages.json").write_text(json.dumps(passages), "utf-8")
    for name in TEACHERS:
        teacher = Teacher(teachers / name, device)
        np.save(out / f"{name}-questions.npy", teacher.embed("questions", questions))
        np.save(out / f"{name}-passages.npy", teacher.embed("passages", passages))
        print(f"{time.monotonic() - start:.0f} s: {len(questions) + len(passages)} texts by {name}", flush=True)


if __name__ == "__main__":
    main()
