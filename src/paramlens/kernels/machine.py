"""Machine settings during a run: CPU threads, precision of matrix products, and functions that torch.compile may fuse."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

from paramlens.kernels.openmp import crowd, waiting
from paramlens.kernels.resources import usable_cores
from paramlens.kernels.settings import MachineSettings

P = ParamSpec("P")
R = TypeVar("R")

MOST_THREADS = 4
"""Maximum number of CPU threads by default; more gain almost nothing on a toy model."""

_PRECISION = {"fp32": "highest", "tf32": "high", "bf16": "medium"}
_compiling = False
"""Global, because PyTorch runs backward passes on its own threads, which do not see the caller's context variables."""


@contextmanager
def machine(config: MachineSettings) -> Iterator[None]:
    """While active, torch uses the settings of `config` (threads, matmul, compile); restored at the end, even after an error."""
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
    """Default number of CPU threads: the usable cores, at most four, and at most OMP_NUM_THREADS if that is set.

    It depends on the machine and its settings only. So other programs can slow a run down, but do not change how its sums are rounded.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(usable_cores(), MOST_THREADS, max(1, int(wanted)) if wanted.isdecimal() else MOST_THREADS)


def fusible(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function of tensors that torch.compile fuses if the configuration sets `compile`."""
    compiled = cache(lambda: torch.compile(function))

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return (compiled() if _compiling else function)(*args, **kwargs)

    return run
