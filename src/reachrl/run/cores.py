"""How many processor cores this process may use: those it is bound to, and no more than its container's quota."""

import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Cores that this process may use, at least 1; a quota of one and a half counts as two."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return bound if quota is None else max(1, min(bound, math.ceil(quota)))


def cpu_quota() -> float | None:
    """Cores' worth of time that the container's control groups grant, the least of all levels; None without a limit."""
    quotas = []
    try:
        lines = _OWN_CGROUP.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, read = _CGROUPS, _quota_of_v2
        elif "cpu" in controllers.split(","):
            root, read = _CGROUPS / controllers, _quota_of_v1
        else:
            continue
        # Inside a container the path may be as the host sees it, and only the root be there.
        folder = root / path.lstrip("/")
        quotas += [read(each) for each in {root, folder, *(p for p in folder.parents if p.is_relative_to(root))}]
    known = [quota for quota in quotas if quota is not None and quota > 0]
    return min(known, default=None)


def _quota_of_v2(folder: Path) -> float | None:
    """From `cpu.max`: microseconds granted, or `max`, and the period."""
    granted, _, period = _read(folder / "cpu.max").partition(" ")
    return float(granted) / float(period) if granted.isdigit() and period.isdigit() else None


def _quota_of_v1(folder: Path) -> float | None:
    """From `cpu.cfs_quota_us`, -1 without a limit, and `cpu.cfs_period_us`."""
    granted, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return float(granted) / float(period) if granted.isdigit() and period.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
