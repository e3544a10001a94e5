"""How a run uses its machine: CPU threads, the precision of matrix products, and what torch.compile may fuse."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from paramlens.config import Config

P = ParamSpec("P")
R = TypeVar("R")

MOST_THREADS = 4
"""More CPU threads than this gain next to nothing on the products of a toy."""

_PRECISION = {"fp32": "highest", "tf32": "high", "bf16": "medium"}
_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


@contextmanager
def machine(config: Config) -> Iterator[None]:
    """While active, torch computes as `config` says (threads, matmul, compile); restored whatever happens."""
    precision, compiling = torch.get_float32_matmul_precision(), _compiling.set(config.compile)
    torch.set_float32_matmul_precision(_PRECISION[config.matmul])
    try:
        with torch_threads(config.threads):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        _compiling.reset(compiling)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """While active, torch computes with `threads` CPU threads; none: as many as `free_threads` counts."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or free_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def free_threads() -> int:
    """Threads for one run: the free cores, four at most.

    Sums may be rounded otherwise with another number of threads: a run that is to be repeated bit for bit names its number.
    """
    return min(free_cores(), MOST_THREADS)


def free_cores() -> int:
    """Cores that this process may use and that others leave free, one at least.

    A thread that must wait for its core holds up all others at the end of every parallel loop: two threads on one free core are
    several times slower than one. What others use is looked at for a tenth of a second, where Linux tells.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if allowed == 1 or (before := _core_seconds()) is None:
        return allowed
    time.sleep(0.1)
    after = _core_seconds() or before
    idle, passed = after[0] - before[0], after[1] - before[1]
    free = round((os.cpu_count() or allowed) * idle / passed) if passed > 0 else allowed
    return max(1, min(allowed, free))


def _core_seconds() -> tuple[float, float] | None:
    """Time all cores have been idle, and all time they have had, in ticks since the machine started."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return ticks[3] + ticks[4], sum(ticks)


def fusible(function: Callable[P, R]) -> Callable[P, R]:
    """A function of tensors that torch.compile may fuse where the configuration says so."""
    compiled = cache(lambda: torch.compile(function))

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return (compiled() if _compiling.get() else function)(*args, **kwargs)

    return run
