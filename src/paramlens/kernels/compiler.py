"""A loop's body as a C function, compiled for this processor; imported only if Numba is installed."""

import ctypes
from typing import Any

import llvmlite.binding as llvm
import numba
from numba import cfunc, types

from paramlens.kernels import loops

_NEVER_CALLED = 1
"""An address for symbols that must be known but are not used without OpenMP."""


def enabled() -> bool:
    return not numba.config.DISABLE_JIT  # pyright: ignore[reportAttributeAccessIssue]


def prefer_wide_vectors() -> None:
    """Let LLVM use 512-bit vectors if the processor has them; by default it uses 256 bits, and γ's loops take a fifth longer.

    This applies to everything that this process compiles with Numba afterwards. NUMBA_CPU_NAME and NUMBA_CPU_FEATURES have priority.
    """
    config: Any = numba.config
    if config.CPU_NAME or config.CPU_FEATURES:
        return
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know this processor's features
        return
    if features.get("avx512f"):
        config.CPU_NAME, config.CPU_FEATURES = llvm.get_host_cpu_name(), features.flatten() + ",-prefer-256-bit"


def compiled(name: str, openmp: ctypes.CDLL | None) -> Any:
    """The body `name` as a C function of one packed argument.

    Numba keeps the machine code in the package's `__pycache__`, in the user's own cache folder if it cannot write there, or in
    NUMBA_CACHE_DIR, so that later processes need not compile it.
    """
    for symbol, function in ((loops.THREAD, "omp_get_thread_num"), (loops.THREADS, "omp_get_num_threads")):
        address = ctypes.cast(openmp[function], ctypes.c_void_p).value if openmp is not None else _NEVER_CALLED
        llvm.add_symbol(symbol, address)
    signature = types.void(types.CPointer(types.int64))
    try:
        return cfunc(signature, cache=True, **loops.OPTIONS)(getattr(loops, name))
    except RuntimeError:  # no folder for it can be written
        return cfunc(signature, **loops.OPTIONS)(getattr(loops, name))
