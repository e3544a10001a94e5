"""Random generators that depend only on their purpose, such as (seed, "masks", step)."""

from hashlib import blake2b
from numbers import Integral

import torch


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator that is a pure function of `key`, such as (seed, "masks", step)."""
    return torch.Generator(device=device).manual_seed(seed_of(*key))


def seed_of(*key: int | str) -> int:
    """A 63-bit number that is a pure function of `key`; NumPy's integers count as Python's."""
    key = tuple(int(part) if isinstance(part, Integral) else part for part in key)
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
