"""Importance by position relative to a role, averaged over sequences in which the role has different positions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

REACH = 5
"""Number of positions on either side of a role."""


@dataclass(frozen=True)
class AlignedImportance:
    """Mean importance around the single position of a role."""

    offsets: list[int]
    """Distances from the role's position, in tokens; those that no sequence has are left out."""
    importance: dict[str, list[float]]
    """Site → mean over sequences of Σ_c g at each offset."""


def aligned_importance(
    g: Mapping[str, Float[Tensor, "*batch C"]], role_index: Int[Tensor, "*batch"], roles: Sequence[str]
) -> dict[str, AlignedImportance]:
    """Mean Σ_c g up to `REACH` positions from every role that has exactly one position in every sequence."""
    maps: dict[str, AlignedImportance] = {}
    for i, role in enumerate(roles):
        at = role_index == i
        if at.dim() != 2 or not (at.sum(1) == 1).all():
            continue
        offset = torch.arange(role_index.shape[1], device=at.device) - at.int().argmax(1, keepdim=True)
        offset = offset.masked_fill(role_index < 0, REACH + 1)  # a position without a role is padding
        offsets = [k for k in range(-REACH, REACH + 1) if (offset == k).any()]
        maps[role] = AlignedImportance(
            offsets, {site: [round(value.sum(-1)[offset == k].mean().item(), 5) for k in offsets] for site, value in g.items()}
        )
    return maps
