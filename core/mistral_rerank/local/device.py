"""The device and the dtype, and what "auto" means for them."""

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
FasterDtype = Literal["bfloat16", "float32"]
_DTYPES_FILE = TypeAdapter(dict[str, FasterDtype])


def pick_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is CUDA, else MPS, else CPU.

    Raises:
        SettingsError: there is no such device on this machine.

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


def pick_devices(names: str) -> tuple[torch.device, ...]:
    """Return the devices of a name as in `pick_device`, or of several with commas between them.

    Raises:
        SettingsError: a device is not on this machine, or they are of different types.

    """
    devices = tuple(pick_device(name.strip()) for name in names.split(","))
    if len({device.type for device in devices}) > 1:
        raise SettingsError(f"device {names!r} has several types; give devices of one, as 'cuda:0,cuda:1'")
    return devices


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; "auto" is bfloat16 if the hardware multiplies it, else float32.

    On a CPU, bfloat16 must also be faster than float32.

    Raises:
        SettingsError: there is no such dtype.

    """
    if name == "auto":
        if not multiplies_bfloat16(device):
            return torch.float32
        return DTYPES[_faster_dtype()] if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise SettingsError(f"dtype {name!r} is not known; give 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[name]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has instructions for products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type == "mps"


def _faster_dtype() -> str:
    """Return the faster dtype of this CPU; it is measured once for each processor and PyTorch, and cached in a file."""
    file = cache_dir() / "dtypes.json"
    capabilities = torch.cpu.get_capabilities()
    key = f"{capabilities.get('cpu_name', capabilities.get('architecture'))}, torch {torch.__version__}"
    measured: dict[str, FasterDtype] = {}
    with suppress(OSError, ValueError):  # no file yet, or a damaged one: measure again
        measured = _DTYPES_FILE.validate_json(file.read_bytes())
    if key not in measured:
        measured[key] = _measure_faster_dtype()
        with suppress(OSError):  # a read-only cache: measure again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, measured)
    return measured[key]


def _measure_faster_dtype() -> FasterDtype:
    """Time a matrix product in both dtypes."""
    best: dict[FasterDtype, float] = {"bfloat16": math.inf, "float32": math.inf}
    factors = {name: torch.ones(1024, 1024, dtype=DTYPES[name]) for name in best}
    for _ in range(6):
        for name, factor in factors.items():  # alternating, so that other load on the machine affects both
            start = time.perf_counter()
            torch.mm(factor, factor)
            best[name] = min(best[name], time.perf_counter() - start)
    return "bfloat16" if best["bfloat16"] < best["float32"] else "float32"
