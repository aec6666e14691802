"""Make a checkpoint of the weights that `train.py` has saved.

python adapter.py TRAINED INIT OUT

INIT is the adapter that the training started from. It says which base and template are used. Its calibration and its
early exit do not hold for the new weights and are left out.
"""

import json
import sys
from pathlib import Path

from model import LINEARS, SCALING
from safetensors.torch import load_file, save_file


def make_checkpoint(trained: Path, init: Path, out: Path) -> None:
    """Write the adapter with its config and `rerank.json`; FileNotFoundError if no weights were saved."""
    tensors = {}
    for file in sorted(trained.glob("adapter-?.safetensors")):
        tensors |= load_file(file)
    if not tensors:
        raise FileNotFoundError(f"{trained} has no adapter-0.safetensors and adapter-1.safetensors of train.py")
    downs = {name: tensor for name, tensor in tensors.items() if "lora_A" in name}
    rank = next(iter(downs.values())).shape[0]
    settings = {
        "r": rank,
        "lora_alpha": round(SCALING * rank),
        "target_modules": [linear.rsplit(".", 1)[1] for linear in LINEARS],
        "layers_to_transform": list(range(len(downs) // len(LINEARS))),
    }
    config = json.loads((init / "adapter_config.json").read_text("utf-8"))
    reading = json.loads((init / "rerank.json").read_text("utf-8"))
    reading = {key: value for key, value in reading.items() if key not in ("calibration", "early_exit")}
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(config | settings, indent=2), "utf-8")
    (out / "rerank.json").write_text(json.dumps(reading, indent=2), "utf-8")


if __name__ == "__main__":
    make_checkpoint(*map(Path, sys.argv[1:4]))
