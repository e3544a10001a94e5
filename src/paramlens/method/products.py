"""What a site computes in a masked run: of its input, stacked for several plans, the target's product or a masked one, as each needs."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paramlens.method.masks import Replacement, mask_noise, masked_linear, stochastic_mask
from paramlens.method.sites import Site, given_input

TargetRows = Callable[[int, int], Tensor]
"""What the target's own weight makes of the input's rows from one to another."""

Product = Callable[[Tensor, TargetRows], Tensor]
"""A site's output from its input."""


def joined(module: nn.Module, products: Sequence[tuple[Site, Product]], leading: tuple[int, ...], *, copies: bool) -> Callable[..., Tensor]:
    """The forward of a module with its sites replaced: the whole weight, or slices of a fused one.

    leading: axes of the input before the last, as the stacked masks have them.
    copies: read a copy of the input, which the model writes into before gradients are taken.
    """
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given = given_input(args, kwargs)
        x = aligned(given.clone() if copies else given, leading)
        site, product = products[0]
        if site.columns is None:
            output = product(x, lambda start, end: original(x[start:end]))
            return output.view(*given.shape[:-1], -1) if given.dim() != x.dim() else output
        output = whole = original(x)
        for site, product in products:
            assert site.columns is not None
            columns = site.columns.to(x.device)
            own = whole.index_select(-1, columns)
            output = output.index_copy(-1, columns, product(x, lambda start, end, own=own: own[start:end]))
        return output.view(*given.shape[:-1], -1) if given.dim() != x.dim() else output

    return forward


def stacked_product(site: Site, U: Tensor, V: Tensor, replacements: list[Replacement | None]) -> Product:
    """What the site computes when `replacements` (one per plan, none: the target's weight) are stacked along its input."""
    runs = [(kind, list(run)) for kind, run in groupby(replacements, key=_product)]

    def product(x: Tensor, target: TargetRows) -> Tensor:
        rows = x.shape[0] // len(replacements)
        outputs, start = list[Tensor](), 0
        for kind, run in runs:
            end = start + rows * len(run)
            if kind == "target":
                outputs.append(target(start, end))
            else:
                masked = [_fitted(replacement, x) for replacement in run if replacement is not None]
                output = masked_linear(x[start:end], U, V, masked, site.bias)
                if kind == "scoped":
                    where = [replacement.where for replacement in masked if replacement.where is not None]
                    output = torch.where(torch.cat(where)[..., None], output, target(start, end))
                outputs.append(output)
            start = end
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    return product


def _product(replacement: Replacement | None) -> Literal["target", "masked", "scoped"]:
    if replacement is None:
        return "target"
    return "masked" if replacement.where is None else "scoped"


def _fitted(replacement: Replacement, x: Tensor) -> Replacement:
    """The replacement's last positions, where the site is given no more than those."""
    g, key, where = replacement.g, replacement.key, replacement.where
    if where is not None:
        where = where.expand(g.shape[:-1])
    if x.dim() != 3 or g.shape[1] <= x.shape[1]:
        return Replacement(g, key, where, replacement.sink)
    last = slice(g.shape[1] - x.shape[1], None)
    mask = g[:, last] if key is None else stochastic_mask(g[:, last], mask_noise(key, g)[:, last])
    return Replacement(mask, None, None if where is None else where[:, last])


def aligned(x: Tensor, leading: Sequence[int]) -> Tensor:
    """`x` with the leading axes `leading`, if its own are those in a row, or those and further ones of one entry."""
    own = x.shape[:-1]
    same = [size for size in own if size != 1] == [size for size in leading if size != 1]
    flat = len(own) == 1 and own[0] == math.prod(leading)
    return x.reshape(*leading, x.shape[-1]) if tuple(own) != tuple(leading) and (same or flat) else x
