"""How PyTorch's idle CPU threads wait. Does not import torch: the variables must be set before its OpenMP library is loaded."""

import ctypes
import os
import sys
import threading
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Waiting = Literal["asleep", "spinning"]

_PASSIVE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""Variables that make idle threads sleep: of the OpenMP standard, of GNU (Linux), and of LLVM and Intel (macOS, Windows)."""

SPINNING = (
    "{threads} threads that spin while they wait: beside other programs this may be much slower than one. "
    "Import paramlens before torch, set OMP_WAIT_POLICY=passive before Python starts, or give threads 1"
)
"""A warning at the start of a run."""

MOST_CROWDED = 16
"""Maximum number of cores for which `crowd` starts threads."""

_crowded = False


def sleep_when_idle() -> None:
    """Make OpenMP's idle threads sleep, unless the user has set one of the variables or torch, which reads them once, is loaded.

    By default they spin. If another program runs too, a spinning thread can block the core that a working thread needs, and a step on
    two threads takes tens of times longer than on one. Child processes inherit the variables.
    """
    if "torch" not in sys.modules and not _given():
        os.environ.update(_PASSIVE)


def waiting() -> Waiting:
    """How idle threads wait, according to the variables, even if the user set them after torch was loaded.

    The variables of GNU and LLVM have priority over the standard's.
    """
    if _crowded:
        return "asleep"
    own = [os.environ[name] for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME") if name in os.environ]
    if own:
        return "asleep" if all(value.strip() == "0" for value in own) else "spinning"
    return "asleep" if os.environ.get("OMP_WAIT_POLICY", "").strip().lower() == "passive" else "spinning"


def crowd() -> None:
    """Make GNU's idle threads sleep although torch is already loaded, unless the user has set one of the variables.

    The library lets no thread spin for long if it has more threads than the machine has cores. So a Python thread starts more threads
    than cores, which sleep until the process ends. With more than `MOST_CROWDED` cores, or at a second call, nothing is done.
    """
    global _crowded
    cores, openmp = os.cpu_count() or 1, library()
    if _crowded or _given() or openmp is None or cores > MOST_CROWDED:
        return
    made = threading.Event()

    def keep() -> None:
        openmp.GOMP_parallel(ctypes.cast(openmp.omp_get_thread_num, ctypes.c_void_p), None, cores + 1, 0)
        made.set()
        threading.Event().wait()

    threading.Thread(target=keep, name="paramlens-openmp", daemon=True).start()
    made.wait()
    _crowded = True


@cache
def library() -> ctypes.CDLL | None:
    """PyTorch's own OpenMP library, if it is GNU's, as on Linux. None: another library, as on macOS and Windows."""
    found = find_spec("torch")
    assert found is not None
    assert found.origin is not None
    package = Path(found.origin).parent
    for path in [*package.glob("lib/libgomp*.so*"), *package.parent.glob("torch.libs/libgomp*.so*")]:
        try:
            openmp = ctypes.CDLL(str(path))
        except OSError:
            continue
        openmp.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        openmp.GOMP_parallel.restype = None
        for query in (openmp.omp_get_thread_num, openmp.omp_get_num_threads):
            query.argtypes, query.restype = [], ctypes.c_int
        return openmp
    return None


def _given() -> bool:
    return any(name in os.environ for name in _PASSIVE)
