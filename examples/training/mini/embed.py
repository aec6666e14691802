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
from texts import TEACHERS, all_texts
from tokenizers import Tokenizer
from transformers import BertModel

PREFIXES = {"minilm": {"questions": "", "passages": ""}, "e5": {"questions": "query: ", "passages": "passage: "}}
MOST_TOKENS = 256
"""Longer texts are truncated."""
BATCH_TOKENS = 131_072
MULTIPLE = 16
"""Rows are padded to a multiple of so many tokens."""


def normalized(folder: Path, texts: list[str]) -> list[str]:
    """Replace code points as a teacher's `norm.json` says, if it has one."""
    if not (folder / "norm.json").is_file():
        return texts
    replacements = json.loads((folder / "norm.json").read_text("utf-8"))["norm"]
    table = {int(point): text for point, text in replacements.items()}
    return [re.sub("  +", " ", text.translate(table)) for text in texts]


def batches(lengths: list[int]) -> Iterator[list[int]]:
    """Divide texts, by length, into batches of about `BATCH_TOKENS` with padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[min(start + 2000, len(order) - 1)]])
        rows = order[start : start + max(1, BATCH_TOKENS // longest)]
        yield rows
        start += len(rows)


@torch.inference_mode()
def embed(folder: Path, texts: list[str], prefix: str, device: torch.device) -> NDArray[np.float16]:
    """Return the means of the last hidden states, with length 1: (texts, hidden) float16."""
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval().to(device)
    if device.type == "cuda":
        model = model.half()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MOST_TOKENS)
    ids = [encoding.ids for encoding in tokenizer.encode_batch([prefix + text for text in normalized(folder, texts)])]
    vectors = np.zeros((len(ids), model.config.hidden_size), np.float16)
    for rows in batches([len(tokens) for tokens in ids]):
        padded = torch.zeros(len(rows), -(-len(ids[rows[-1]]) // MULTIPLE) * MULTIPLE, dtype=torch.int64)
        mask = torch.zeros_like(padded)
        for row, index in enumerate(rows):
            padded[row, : len(ids[index])] = torch.tensor(ids[index])
            mask[row, : len(ids[index])] = 1
        mask = mask.to(device)
        states = model(input_ids=padded.to(device), attention_mask=mask).last_hidden_state
        means = (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        vectors[rows] = torch.nn.functional.normalize(means, dim=-1).half().cpu().numpy()
    return vectors


def main() -> None:
    """Write the texts and their vectors."""
    data, teachers, out = map(Path, sys.argv[1:4])
    device = torch.device(sys.argv[4] if len(sys.argv) > 4 else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in train.py
    start = time.monotonic()
    for kind, texts in zip(("questions", "passages"), all_texts(data), strict=True):
        (out / f"{kind}.json").write_text(json.dumps(texts), "utf-8")
        for teacher in TEACHERS:
            vectors = embed(teachers / teacher, texts, PREFIXES[teacher][kind], device)
            np.save(out / f"{teacher}-{kind}.npy", vectors)
            print(f"{time.monotonic() - start:.0f} s: {len(texts)} {kind} by {teacher}", flush=True)


if __name__ == "__main__":
    main()
