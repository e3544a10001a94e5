"""The CPU's inner loops, compiled by Numba on first use: single passes over numbers that PyTorch would read and write several times.

Each has its twin in plain PyTorch where it is called; `serves` says which of the two runs. Kernels run on PyTorch's own OpenMP
threads: a second pool would fight them for the cores. Work is cut into units that no two threads share, so results do not
depend on the number of threads.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def serves(*tensors: Tensor) -> bool:
    """Whether the compiled kernels take these tensors: float32, on the CPU, where Numba is installed."""
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors) and _kernels() is not None


def cached_numbers() -> int:
    """Float32 numbers that fit into the second-level caches of PyTorch's threads: what is worked on at once."""
    return _cache_bytes() // 4 * torch.get_num_threads()


@cache
def _cache_bytes() -> int:
    """One core's second-level cache as Linux reports it, within reason; 1 MiB where nothing is reported."""
    try:
        size = int(Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text(encoding="ascii").strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        size = 2**20
    return min(max(size, 2**19), 2**21)


@cache
def _kernels() -> Any:
    try:
        from paramlens import _kernels
    except ImportError:  # Numba is not made for this Python or machine
        return None
    if not _kernels.enabled():
        return None
    _kernels.prefer_wide_vectors()
    return _kernels


@cache
def _openmp() -> ctypes.CDLL | None:
    """PyTorch's own OpenMP library, where it is GNU's, as on Linux; without it, as on macOS and Windows, kernels run on one thread."""
    package = Path(torch.__file__).parent
    for path in [*package.glob("lib/libgomp*.so*"), *package.parent.glob("torch.libs/libgomp*.so*")]:
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        for query in (library.omp_get_thread_num, library.omp_get_num_threads):
            query.argtypes, query.restype = [], ctypes.c_int
        return library
    return None


class _Kernel:
    """A loop over `units`, split over threads. Arguments: contiguous tensors, whole numbers, floats; none is a null address."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.run: Any = None

    def __call__(self, units: int, *arguments: Tensor | int | float | None) -> None:
        if self.run is None:
            self.run = _kernels().compiled(self.name, _openmp())
        packed = (ctypes.c_int64 * _kernels().SLOTS)(units, *map(_packed, arguments))
        threads = min(torch.get_num_threads(), units)
        openmp = _openmp()
        if openmp is None or threads <= 1:
            self.run.ctypes(ctypes.cast(packed, ctypes.POINTER(ctypes.c_int64)))
        else:
            openmp.GOMP_parallel(self.run.address, packed, threads, 0)


def _packed(value: Tensor | int | float | None) -> int:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return value.data_ptr()
    if isinstance(value, float):
        return ctypes.c_int64.from_buffer(ctypes.c_double(value)).value
    return 0 if value is None else value


mlps_forward = _Kernel("mlps_forward")
mlps_backward = _Kernel("mlps_backward")
scalar_mlps_forward = _Kernel("scalar_mlps_forward")
scalar_mlps_backward = _Kernel("scalar_mlps_backward")
lower_backward = _Kernel("lower_backward")
minimality = _Kernel("minimality")
uniform = _Kernel("uniform")
mask_forward = _Kernel("mask_forward")
mask_backward = _Kernel("mask_backward")
divergence_forward = _Kernel("divergence_forward")
divergence_backward = _Kernel("divergence_backward")


def units(tensor: Tensor) -> int:
    """Units of an elementwise kernel over all numbers of `tensor`."""
    return -(-tensor.numel() // _kernels().BLOCK)
