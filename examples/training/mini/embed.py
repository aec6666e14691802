"""Embed all texts of the training sets with all-MiniLM-L6-v2 and multilingual-e5-small.

python embed.py DATA MODELS OUT [DEVICE]

MODELS has the folders `minilm` and `e5`, each a BertModel of transformers with a `tokenizer.json`.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from texts import all_texts
from tokenizers import Tokenizer
from transformers import BertModel

PREFIXES = {"minilm": {"questions": "", "passages": ""}, "e5": {"questions": "query: ", "passages": "passage: "}}
LONGEST = 256
BATCH_TOKENS = 131_072


@torch.inference_mode()
def embed(folder: Path, texts: list[str], prefix: str, device: str) -> np.ndarray:
    """Return the normalized means of the last hidden states: (texts, 384) float16."""
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval().to(device)
    if device == "cuda":
        model = model.half()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    clean = str
    if (folder / "norm.json").is_file():
        about = json.loads((folder / "norm.json").read_text("utf-8"))
        table = {int(code): text for code, text in about["norm"].items()}

        def clean(text: str) -> str:
            return re.sub("  +", " ", text.translate(table))

    ids = [encoded.ids for encoded in tokenizer.encode_batch([prefix + clean(text) for text in texts])]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    vectors = np.zeros((len(ids), model.config.hidden_size), np.float16)
    start = 0
    while start < len(order):
        longest = max(len(ids[order[min(start + 2000, len(order) - 1)]]), 1)
        rows = order[start : start + max(1, BATCH_TOKENS // longest)]
        padded = np.zeros((len(rows), len(ids[rows[-1]])), np.int64)
        mask = np.zeros_like(padded)
        for row, index in enumerate(rows):
            padded[row, : len(ids[index])] = ids[index]
            mask[row, : len(ids[index])] = 1
        on_device = torch.from_numpy(mask).to(device)
        states = model(input_ids=torch.from_numpy(padded).to(device), attention_mask=on_device).last_hidden_state
        means = (states.float() * on_device[..., None]).sum(1) / on_device.sum(1, keepdim=True)
        vectors[rows] = torch.nn.functional.normalize(means, dim=-1).half().cpu().numpy()
        start += len(rows)
    return vectors


def main() -> None:
    """Write the texts and their vectors."""
    data, models, out = map(Path, sys.argv[1:4])
    device = sys.argv[4] if len(sys.argv) > 4 else "cpu"
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for kind, texts in zip(("questions", "passages"), all_texts(data), strict=True):
        (out / f"{kind}.json").write_text(json.dumps(texts), "utf-8")
        for teacher, prefixes in PREFIXES.items():
            np.save(out / f"{teacher}-{kind}.npy", embed(models / teacher, texts, prefixes[kind], device))
            print(f"{time.monotonic() - start:.0f} s: {len(texts)} {kind} by {teacher}", flush=True)


if __name__ == "__main__":
    main()
