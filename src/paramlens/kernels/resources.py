"""Cores and memory that this process may use, within the limits of its control groups (Linux)."""

import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_GROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Number of cores that this process may use, by its CPU affinity and its control groups; at least 1."""
    process = psutil.Process()
    allowed = len(process.cpu_affinity() or ()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1  # macOS has no affinity
    return max(1, min(allowed, int(min(_cpu_quotas(), default=allowed))))


def free_memory(device: str) -> int | None:
    """Free memory of a device in bytes, on a CPU within the limits of the control groups. None: the device does not report it."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_memory_left()]) if kind == "cpu" else None


def _cpu_quotas(root: Path = _GROUPS, membership: Path = _MEMBERSHIP) -> Iterator[float]:
    """Number of cores that each control group may use: CPU time per period / period. Groups without a limit are skipped."""
    for folder in _groups("cpu", root, membership):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            try:
                limit, period = " ".join(_content(folder / name) for name in files).split()
                if int(limit) > 0:
                    yield int(limit) / int(period)
            except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max": no limit
                continue


def _memory_left(root: Path = _GROUPS, membership: Path = _MEMBERSHIP) -> Iterator[int]:
    """Bytes that each control group has left; file caches that can be dropped count as free. Groups without a limit are skipped."""
    for folder in _groups("memory", root, membership):
        for files in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            try:
                limit, used = (int(_content(folder / name)) for name in files)
                cached = re.search(r"^(?:total_)?inactive_file (\d+)$", _content(folder / "memory.stat"), re.MULTILINE)
            except (OSError, ValueError):
                continue
            yield max(0, limit - used + (int(cached[1]) if cached else 0))


def _groups(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """Folders of this process's control groups, the innermost first: those of version 2, and those of version 1 with `controller`."""
    try:
        lines = _content(membership).splitlines()
    except OSError:
        return
    for _, controllers, name in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers or controller in controllers.split(","):
            top = root / controllers
            group = top / name.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _content(file: Path) -> str:
    return file.read_text(encoding="utf-8")
