"""Inner loops for the CPU, compiled by Numba on first use: one pass over numbers that PyTorch would read and write several times.

Each has a version in plain PyTorch where it is called; `serves` decides which of the two runs. Kernels run on PyTorch's own OpenMP
threads, because a second pool would compete for the cores, or on one thread if that library is not GNU's. Work is split into units,
and each unit is computed by one thread, so results do not depend on the number of threads.
"""

import ctypes
import operator
from collections.abc import Callable
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from paramlens.kernels.openmp import library

MIN_NUMBERS = 2**16
"""Minimum number of float32 numbers in each tensor of a chunk: with fewer, the calls take as long as the work."""


def serves(*tensors: Tensor) -> bool:
    """Whether the compiled kernels can use these tensors: float32 on the CPU, no subclass such as DTensor, with Numba installed."""
    plain = all(type(each) in (Tensor, Parameter) and each.is_cpu and each.dtype is torch.float32 for each in tensors)
    return plain and loop_compiler() is not None


def cached_numbers() -> int:
    """How many float32 numbers fit into the second-level caches of PyTorch's threads: the size of a chunk."""
    return _cache_bytes() // 4 * torch.get_num_threads()


def chunk_rows(width: int, *, tensors: int) -> int:
    """Number of rows in a chunk whose `tensors` tensors, of `width` numbers a row, fit into the threads' caches, if not too few."""
    return max(1, max(cached_numbers() // tensors, MIN_NUMBERS) // width)


@cache
def _cache_bytes() -> int:
    """Size of one core's second-level cache as Linux reports it, limited to 0.5 to 2 MiB; 1 MiB if it reports none."""
    try:
        size = int(Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text(encoding="ascii").strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        size = 2**20
    return min(max(size, 2**19), 2**21)


@cache
def loop_compiler() -> Any:
    """The module `compiler`. None: PyTorch computes everything."""
    try:
        from paramlens.kernels import compiler
    except ImportError:  # Numba does not support this Python or machine
        return None
    if not compiler.enabled():
        return None
    compiler.prefer_wide_vectors()
    return compiler


class _Kernel:
    """A loop over `units`, split over threads, with the types of its other arguments in the order in which its body unpacks them.

    A call raises `TypeError` for an argument of a wrong type, which the body would misread.
    """

    def __init__(self, name: str, types: str) -> None:
        """types: one letter per argument: t, a contiguous float32 tensor on the CPU; i, an integer; f, a float."""
        self.name, self.types, self.pack = name, types, [_PACK[kind] for kind in types]
        self.run: Any = None

    def __call__(self, units: int, *arguments: Tensor | float) -> None:
        if self.run is None:
            self.run = loop_compiler().compiled(self.name, library())
        packed = self.packed(units, *arguments)
        threads = min(torch.get_num_threads(), units)
        openmp = library()
        if openmp is None or threads <= 1:
            self.run.ctypes(packed)
        else:
            packed[-1] = True
            openmp.GOMP_parallel(self.run.address, packed, threads, 0)

    def packed(self, units: int, *arguments: Tensor | float) -> "ctypes.Array[ctypes.c_int64]":
        """The compiled body's single argument: `units` and `arguments` as 64-bit words, floats as their bits."""
        if len(arguments) != len(self.types):
            raise TypeError(f"kernel {self.name}: {len(arguments)} arguments; it takes {len(self.types)} after the units")
        try:
            words = [pack(value) for pack, value in zip(self.pack, arguments, strict=True)]
        except TypeError as error:
            raise TypeError(f"kernel {self.name}: {error}") from None
        return _packed_words()(operator.index(units), *words)


@cache
def _packed_words() -> "type[ctypes.Array[ctypes.c_int64]]":
    return ctypes.c_int64 * loop_compiler().loops.SLOTS


def _address(value: object) -> int:
    if not (isinstance(value, Tensor) and value.dtype is torch.float32 and value.is_cpu and value.is_contiguous()):
        raise TypeError(f"a contiguous float32 tensor on the CPU is needed, not {_described(value)}")
    return value.data_ptr()


def _float_bits(value: Any) -> int:
    if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.dim() == 0):
        raise TypeError(f"a number is needed, not {_described(value)}")
    return ctypes.c_int64.from_buffer(ctypes.c_double(float(value))).value


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    strided = "" if value.is_contiguous() else ", not contiguous"
    return f"a tensor {tuple(value.shape)} of {value.dtype} on {value.device}{strided}"


_PACK: dict[str, Callable[[Any], int]] = {"t": _address, "i": operator.index, "f": _float_bits}


mlps_forward = _Kernel("mlps_forward", "tttttiii")
mlps_backward = _Kernel("mlps_backward", "tttttttiii")
scalar_mlps_forward = _Kernel("scalar_mlps_forward", "ttttttiii")
scalar_mlps_backward = _Kernel("scalar_mlps_backward", "ttttttttttiii")
lower_backward = _Kernel("lower_backward", "ttti")
minimality = _Kernel("minimality", "tttiff")
uniform = _Kernel("uniform", "tii")
mask_forward = _Kernel("mask_forward", "ttiiii")
mask_backward = _Kernel("mask_backward", "ttttiiii")
divergence_forward = _Kernel("divergence_forward", "tttttii")
divergence_backward = _Kernel("divergence_backward", "tttttii")


def units(tensor: Tensor) -> int:
    """Number of units of an elementwise kernel over `tensor`."""
    return -(-tensor.numel() // loop_compiler().loops.BLOCK)
