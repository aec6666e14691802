"""Which device and which number format to use when the user says "auto"."""

from __future__ import annotations

import torch

from mistral_rerank.errors import SettingsError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        raise SettingsError(f"device {name!r} is not usable here; give 'auto', 'cpu', 'cuda' or 'mps'") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Give the dtype of that name; "auto" is bfloat16 where the hardware multiplies it, else float32.

    Raises:
        SettingsError: no such dtype.

    """
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
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
