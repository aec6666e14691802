"""Conversion of other libraries' values to plain Python ones."""

from __future__ import annotations

import os


def plain(value: object) -> object:
    """Convert a path to a string, a numpy scalar to a Python number, `torch.device` and `torch.dtype` to names.

    Any other value is returned unchanged. Neither numpy nor torch is imported.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    kind = type(value)
    if kind.__module__ == "torch" and kind.__name__ in {"device", "dtype"}:
        return str(value).removeprefix("torch.")
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value
