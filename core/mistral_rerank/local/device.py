"""Which device and which number format to use when the user says "auto"."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import Literal

import torch
from pydantic import TypeAdapter

from mistral_rerank.data_files.atomic import write_json
from mistral_rerank.errors import SettingsError
from mistral_rerank.local.checkpoints.bases import cache_dir

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Probed = Literal["bfloat16", "float32"]
_ANSWERS = TypeAdapter(dict[str, Probed])


def pick_device(name: str) -> torch.device:
    """Give the device of that name; "auto" is CUDA, else MPS, else CPU.

    Raises:
        SettingsError: no such device, or not on this machine.

    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if "forked subprocess" in str(error):
            raise SettingsError(
                f"device {name!r} cannot be used in a forked process whose parent has used it; start workers with "
                "'spawn' instead of 'fork', or use the device after the fork alone"
            ) from error
        raise SettingsError(f"device {name!r} is not usable here; give 'auto', 'cpu', 'cuda' or 'mps'") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Give the dtype of that name; "auto" is bfloat16 where the hardware multiplies it, else float32.

    A CPU must also be faster in it.

    Raises:
        SettingsError: no such dtype.

    """
    if name == "auto":
        if not multiplies_bfloat16(device):
            return torch.float32
        return DTYPES[_faster_on_cpu()] if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise SettingsError(f"dtype {name!r} is not known; give 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[name]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether `device` has instructions that multiply bfloat16, not only an emulation."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type == "mps"


def _faster_on_cpu() -> str:
    """Time a product in both dtypes, once for each processor and torch; the cache folder keeps the answer."""
    file = cache_dir() / "dtypes.json"
    able = torch.cpu.get_capabilities()
    here = f"{able.get('cpu_name', able.get('architecture'))}, torch {torch.__version__}"
    kept: dict[str, Probed] = {}
    with suppress(OSError, ValueError):  # not there yet, or damaged: it is timed and written anew
        kept = _ANSWERS.validate_json(file.read_bytes())
    if here not in kept:
        kept[here] = _faster()
        with suppress(OSError):  # a folder that cannot be written: it is timed again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, kept)
    return kept[here]


def _faster() -> Probed:
    best: dict[Probed, float] = {"bfloat16": math.inf, "float32": math.inf}
    factors = {name: torch.ones(1024, 1024, dtype=DTYPES[name]) for name in best}
    for _ in range(6):
        for name, factor in factors.items():  # in turn, so that what else the machine does meets both
            start = time.perf_counter()
            torch.mm(factor, factor)
            best[name] = min(best[name], time.perf_counter() - start)
    return "bfloat16" if best["bfloat16"] < best["float32"] else "float32"
