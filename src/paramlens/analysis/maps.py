"""Importance by place: averaged over sequences in which a role stands at different positions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

REACH = 5
"""Positions either side of a role."""


@dataclass(frozen=True)
class AlignedImportance:
    """Mean importance around the one position of a role."""

    offsets: list[int]
    """Positions from the role's, in tokens; those that no sequence has are left out."""
    importance: dict[str, list[float]]
    """Site → mean over sequences of Σ_c g at each offset."""


def aligned_importance(
    g: Mapping[str, Float[Tensor, "*batch C"]], role_index: Int[Tensor, "*batch"], roles: Sequence[str]
) -> dict[str, AlignedImportance]:
    """For every role that stands at exactly one position of every sequence: mean Σ_c g up to `REACH` positions from it."""
    maps: dict[str, AlignedImportance] = {}
    for i, role in enumerate(roles):
        at = role_index == i
        if at.dim() != 2 or not (at.sum(1) == 1).all():
            continue
        offset = torch.arange(role_index.shape[1], device=at.device) - at.int().argmax(1, keepdim=True)
        offset = offset.masked_fill(role_index < 0, REACH + 1)  # positions of no role are padding
        offsets = [k for k in range(-REACH, REACH + 1) if (offset == k).any()]
        maps[role] = AlignedImportance(
            offsets, {site: [round(value.sum(-1)[offset == k].mean().item(), 5) for k in offsets] for site, value in g.items()}
        )
    return maps
