"""The pair of leaky hard sigmoids σ_H: `lower` turns pre-activations into importances g, `upper` into the input of minimality."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.kernels import native

LEAK = 0.01
"""Slope of the leaky side of both sigmoids."""


class _Lower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor) -> Tensor:
        ctx.save_for_backward(pre)
        return pre.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (pre,) = ctx.saved_tensors
        if native.serves(pre, grad):
            below = torch.empty_like(pre, memory_format=torch.contiguous_format)
            native.lower_backward(native.units(pre), pre.contiguous(), grad.contiguous(), below, pre.numel())
            return below
        below = LEAK * grad.clamp(max=0)  # a descent step along a negative gradient raises pre
        return torch.where(pre <= 0, below, torch.where(pre <= 1, grad, 0))


def lower(pre: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Importance g: `clamp(pre, 0, 1)`.

    Gradient: 1 in (0, 1], 0 above 1; at or below 0 it is 0.01 if descent would raise pre, and 0 otherwise. So below 0
    only reconstruction can revive a subcomponent.
    """
    return _Lower.apply(pre)


def upper(pre: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Input of minimality: `1 + 0.01 (pre - 1)` above 1, `clamp(pre, 0, 1)` elsewhere; gradient 0 at or below 0.

    So above 1 only minimality can lower a subcomponent.
    """
    return torch.where(pre > 1, 1 + LEAK * (pre - 1), torch.where(pre > 0, pre, torch.zeros_like(pre)))
