"""The random generators that a run, its model or its batches may use. They are seeded for a run and saved in its checkpoints."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """While active, the global generators of Python, NumPy and torch (CPU and `device`) start from `seed`. Always restored at the end."""
    before = rng_state(device)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # the user's model may use the global generator
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_rng_state(before, device)


def rng_state(device: str) -> dict[str, Tensor]:
    """The states of these generators as tensors, by name."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if (kind := torch.device(device).type) in ("cuda", "mps"):
        states[kind] = torch.cuda.get_rng_state(device) if kind == "cuda" else torch.mps.get_rng_state()
    return states


def set_rng_state(states: Mapping[str, Tensor], device: str) -> None:
    """Set the states that `rng_state` returned. A generator without a state in `states` is not changed."""
    torch.set_rng_state(states["torch"])
    if "python" in states:
        gauss = states["python.gauss"].tolist()
        random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    if "numpy" in states:
        *keys, position, has_gauss = states["numpy"].tolist()
        state = ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, states["numpy.gauss"].item())
        np.random.set_state(state)
    kind = torch.device(device).type
    if kind in states and kind == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    elif kind in states and kind == "mps":
        torch.mps.set_rng_state(states["mps"])
