"""The number of CPU threads: PyTorch counts the cores of the machine, and a container may have fewer."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def set_threads(threads: int | None = None) -> None:
    """Set the threads of PyTorch.

    Args:
        threads: None for OMP_NUM_THREADS, or else at most the CPUs that the container may use.

    """
    if threads is None and "OMP_NUM_THREADS" not in os.environ and (quota := cpu_quota()) is not None:
        threads = max(1, min(torch.get_num_threads(), int(quota)))
    if threads is not None:
        torch.set_num_threads(threads)


def cpu_quota(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """Return the CPUs that the cgroups of this process allow, or None without a limit."""
    quotas = []
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        group = Path(path.lstrip("/"))
        if not controllers:  # version 2, where the limits of parents count too
            limits = (_read(cgroups / parent / "cpu.max").split() for parent in (group, *group.parents))
        elif "cpu" in controllers.split(","):
            folders = (cgroups / "cpu" / group, cgroups / "cpu")
            names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
            limits = (" ".join(_read(folder / name) for name in names).split() for folder in folders)
        else:
            continue
        quotas += [
            int(limit[0]) / int(limit[1]) for limit in limits if len(limit) == 2 and limit[0] not in ("max", "-1")
        ]
    return min(quotas, default=None)


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except OSError:  # no Linux, or a group outside this namespace
        return ""
