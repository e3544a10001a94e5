"""How PyTorch's CPU threads wait for one another. No torch: the variables must be set before its OpenMP library is loaded."""

import os
import sys
from typing import Literal

Waiting = Literal["asleep", "spinning"]

_PASSIVE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""What makes idle threads sleep: the standard's variable, then GNU's own (Linux) and LLVM's and Intel's own (macOS, Windows)."""

SPINNING = (
    "{threads} threads that spin while they wait: beside other programs this may be much slower than one. "
    "Import paramlens before torch, set OMP_WAIT_POLICY=passive before Python starts, or give threads 1"
)
"""Told at the start of a run."""


def sleep_when_idle() -> None:
    """Have OpenMP's idle threads sleep, unless the user has set one of the variables or torch, which reads them once, is loaded.

    By default they spin. Beside another program the one that spins keeps its core from the one that is waited for, and a step on two
    threads then takes tens of times longer than on one. Programs that this process starts inherit the variables.
    """
    if "torch" not in sys.modules and not _given():
        os.environ.update(_PASSIVE)


def waiting() -> Waiting:
    """How idle threads wait, as far as the variables tell; those set by the user after torch was loaded are taken at their word.

    GNU's and LLVM's own variables outrank the standard's.
    """
    own = [os.environ[name] for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME") if name in os.environ]
    if own:
        return "asleep" if all(value.strip() == "0" for value in own) else "spinning"
    return "asleep" if os.environ.get("OMP_WAIT_POLICY", "").strip().lower() == "passive" else "spinning"


def _given() -> bool:
    return any(name in os.environ for name in _PASSIVE)
