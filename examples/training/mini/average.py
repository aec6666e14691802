"""Average the weights of checkpoints that were trained from the same weights, on different groups.

python average.py OUT CHECKPOINT CHECKPOINT [CHECKPOINT ...]

The config and the card are those of the first checkpoint.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"


def average(out: Path, checkpoints: list[Path]) -> None:
    """Write the checkpoint whose LoRA matrices and head are the means; KeyError if the tensors have other names."""
    tensors = [load_file(checkpoint / WEIGHTS) for checkpoint in checkpoints]
    means = {name: torch.stack([part[name].float() for part in tensors]).mean(0) for name in tensors[0]}
    shutil.copytree(checkpoints[0], out)
    save_file({name: mean.to(tensors[0][name].dtype) for name, mean in means.items()}, out / WEIGHTS, {"format": "pt"})


if __name__ == "__main__":
    average(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
