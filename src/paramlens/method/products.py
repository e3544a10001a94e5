"""The product of a site in a masked run with stacked plans: for each plan the target's product or a masked one."""

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
        for kind, run in runs:
            end = start + rows * len(run)
            if kind == "target":
                outputs.append(target(start, end))
            else:
                masked = [_fitted(replacement, x) for replacement in run if replacement is not None]
                output = site.masked(x[start:end], U, V, masked)
                if kind == "scoped":
                    where = [replacement.where for replacement in masked if replacement.where is not None]
                    output = torch.where(torch.cat(where)[..., None], output, target(start, end))
                outputs.append(output)
            start = end
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    return Product(compute, (len(replacements) * shape[0], *shape[1:-1]), copies)


def _product(replacement: Replacement | None) -> Literal["target", "masked", "scoped"]:
    if replacement is None:
        return "target"
    return "masked" if replacement.where is None else "scoped"


def _fitted(replacement: Replacement, x: Tensor) -> Replacement:
    """The replacement, cut to its last positions if the site receives only those."""
    g, key, where = replacement.g, replacement.key, replacement.where
    if where is not None:
        where = where.expand(g.shape[:-1])
    if x.dim() != 3 or g.shape[1] <= x.shape[1]:
        return Replacement(g, key, where, replacement.sink)
    last = slice(g.shape[1] - x.shape[1], None)
    mask = g[:, last] if key is None else stochastic_mask(g[:, last], mask_noise(key, g)[:, last])
    return Replacement(mask, None, None if where is None else where[:, last])
