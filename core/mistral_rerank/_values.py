"""Values as other libraries hold them, turned into plain Python ones."""

from __future__ import annotations

import os


def plain(value: object) -> object:
    """Turn a path into a string, a numpy scalar into a Python number, `torch.device` and `torch.dtype` into names.

    Everything else comes back as it is. Neither numpy nor torch is imported.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    kind = type(value)
    if kind.__module__ == "torch" and kind.__name__ in {"device", "dtype"}:
        return str(value).removeprefix("torch.")
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value
