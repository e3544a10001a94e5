"""How a run uses its machine: CPU threads, the precision of matrix products, and what torch.compile may fuse."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from paramlens.kernels.openmp import crowd, waiting
from paramlens.kernels.settings import MachineSettings

P = ParamSpec("P")
R = TypeVar("R")

MOST_THREADS = 4
"""More CPU threads than this gain next to nothing on the products of a toy."""

_PRECISION = {"fp32": "highest", "tf32": "high", "bf16": "medium"}
_compiling = False
"""Of the whole process: PyTorch runs backward passes on threads of its own, which see none of the caller's context variables."""


@contextmanager
def machine(config: MachineSettings) -> Iterator[None]:
    """While active, torch computes as `config` says (threads, matmul, compile); restored whatever happens."""
    global _compiling
    precision, compiling = torch.get_float32_matmul_precision(), _compiling
    _compiling = config.compile
    torch.set_float32_matmul_precision(_PRECISION[config.matmul])
    try:
        with torch_threads(config.threads):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        _compiling = compiling


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """While active, torch computes with `threads` CPU threads. Defaults to `default_threads()`."""
    before = torch.get_num_threads()
    count = threads or default_threads()
    if count > 1 and waiting() == "spinning":
        crowd()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_threads() -> int:
    """CPU threads of a run that does not name their number: the usable cores, at most four and at most OMP_NUM_THREADS where that is set.

    A function of the machine and its settings. What other programs do changes how fast a run is, not how its sums are rounded.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(usable_cores(), MOST_THREADS, max(1, int(wanted)) if wanted.isdecimal() else MOST_THREADS)


def usable_cores() -> int:
    """Cores that this process may use, one at least: those it may run on, within what its control group may spend of them (Linux)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, int(min(_quotas(), default=allowed))))


def _quotas(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """Cores that each control group around this process may keep busy; nothing for those without a limit, or where there are none."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for _, controllers, name in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers
        group = top / name.lstrip("/")
        for folder in (group, *group.parents):
            if folder == top.parent:
                break
            quota = _quota(folder)
            if quota is not None:
                yield quota


def _quota(folder: Path) -> float | None:
    """Time in each period over the period: of cpu.max (version 2), or of version 1's two files; none if unlimited or not told."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            limit, period = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
            if int(limit) > 0:
                return int(limit) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None


def fusible(function: Callable[P, R]) -> Callable[P, R]:
    """A function of tensors that torch.compile may fuse where the configuration says so."""
    compiled = cache(lambda: torch.compile(function))

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return (compiled() if _compiling else function)(*args, **kwargs)

    return run
