"""The product of a site in a masked run with stacked plans: for each plan the target's product or a masked one.

With the remainder Δ = W - U V as one more component, whose mask is m_Δ, a masked product is

    ((x @ U) * r) @ V + m_Δ x Δ + bias  =  ((x @ U) * (r - m_Δ)) @ V + m_Δ x W + bias

so Δ is never computed, all components add up to W to rounding whatever C is, and masks of 1 give the target.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from paramlens.method.masks import Replacement, mask_noise, stochastic_mask
from paramlens.method.sites import Product, Site, TargetRows


def stacked_product(site: Site, U: Tensor, V: Tensor, replacements: list[Replacement | None], *, copies: bool) -> Product:
    """The product of the site for stacked plans; `replacements` has one entry per plan, None for the target's weight."""
    runs = [(kind, list(run)) for kind, run in groupby(replacements, key=_product)]
    shape = next(replacement.g.shape for replacement in replacements if replacement is not None)

    def compute(x: Tensor, target: TargetRows) -> Tensor:
        rows = x.shape[0] // len(replacements)
        outputs, start = list[Tensor](), 0
        for (kind, _), run in runs:
            end = start + rows * len(run)
            if kind == "target":
                outputs.append(target(start, end))
            else:
                masked = [_fitted(replacement, x) for replacement in run if replacement is not None]
                output = site.masked(x[start:end], U, V, masked)
                if masked[0].remainder is not None:
                    output = output + _of_target(site, masked, target(start, end))
                if kind == "scoped":
                    where = [replacement.where for replacement in masked if replacement.where is not None]
                    output = torch.where(torch.cat(where)[..., None], output, target(start, end))
                outputs.append(output)
            start = end
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    return Product(compute, (len(replacements) * shape[0], *shape[1:-1]), copies)


def _product(replacement: Replacement | None) -> tuple[Literal["target", "masked", "scoped"], bool]:
    """How a plan's product is computed, and whether the remainder is in it; plans side by side are computed together if they agree."""
    if replacement is None:
        return "target", False
    return "masked" if replacement.where is None else "scoped", replacement.remainder is not None


def _of_target(site: Site, masked: Sequence[Replacement], output: Tensor) -> Tensor:
    """m_Δ x W, from the target's output x W + bias."""
    remainders = torch.cat([each.remainder for each in masked if each.remainder is not None])
    product = output if site.bias is None else output - site.bias
    return remainders[..., None] * product


def _fitted(replacement: Replacement, x: Tensor) -> Replacement:
    """The replacement, cut to its last positions if the site receives only those."""
    g, key, where, remainder = replacement.g, replacement.key, replacement.where, replacement.remainder
    if where is not None:
        where = where.expand(g.shape[:-1])
    if x.dim() != 3 or g.shape[1] <= x.shape[1]:
        return replace(replacement, where=where)
    last = slice(g.shape[1] - x.shape[1], None)
    mask = g[:, last] if key is None else stochastic_mask(g[:, last], mask_noise(key, g)[:, last])
    return Replacement(mask, None, None if where is None else where[:, last], None, None if remainder is None else remainder[:, last])
