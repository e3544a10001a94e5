"""How many CPU threads torch computes with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """While active, torch computes with `threads` CPU threads; none: one per core this process may use, four at most."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4))
    try:
        yield
    finally:
        torch.set_num_threads(before)
