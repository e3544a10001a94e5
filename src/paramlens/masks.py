"""From importance g to masks r, and which sites a plan replaces (Algorithm 3, line 4; eqs. 5 to 8)."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def rounded_mask(g: Float[Tensor, "*batch C"], *, threshold: float) -> Float[Tensor, "*batch C"]:
    """1 where g > threshold, else 0: the subcomponents Table 1 counts, fully on, and no others."""
    return (g > threshold).to(g.dtype)


def site_subsets(
    count: int,
    shape: tuple[int, ...],
    generator: torch.Generator,
) -> Bool[Tensor, "site *shape"]:
    """Random subsets M of `count` sites (eq. 5): size k ~ U{1..count}, then a uniform k-subset, independently for each cell of `shape`."""
    k: Int[Tensor, "*shape"] = torch.randint(1, count + 1, shape, generator=generator, device=generator.device)
    order = torch.rand(count, *shape, generator=generator, device=generator.device).argsort(dim=0).argsort(dim=0)
    return order < k


def subset_shape(scope: Literal["forward", "sequence", "position"], batch: tuple[int, ...]) -> tuple[int, ...]:
    """The cells that draw M independently: one, one per sequence, or one per position; shaped to broadcast over `batch`."""
    return {"forward": (), "sequence": (batch[0], *(1 for _ in batch[1:])), "position": batch}[scope]
