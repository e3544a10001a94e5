"""Minimality (eq. 1): Σ_sites Σ_c g^p, with a power p that is annealed over the run."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.kernels import native
from paramlens.kernels.machine import fusible
from paramlens.method.importance.sigmoids import LEAK, upper
from paramlens.method.losses.loss import DirectLoss, LossInputs, register
from paramlens.method.settings import Losses


def minimality(
    pre: Mapping[str, Float[Tensor, "*batch C"]], *, p: float | Tensor, eps: float, present: Float[Tensor, ""] | float = 1.0
) -> Float[Tensor, ""]:
    """Σ_sites Σ_c ((g + ε)^p - ε^p), mean over batch and positions, where g = upper(pre) (eq. 1).

    present: the share of positions that count, in (0, 1]; at all others `pre` is 0, which costs nothing.

    Subtracting ε^p removes the constant that ε adds (0.06 per subcomponent at p = 0.1, ε = 1e-12); the slope is at most p ε^(p - 1).
    """
    return torch.stack([_Minimality.apply(value, p, eps) for value in pre.values()]).sum() / present


class _Minimality(torch.autograd.Function):
    """Minimality of one site. The compiled loop computes the slope with the power in the forward pass, PyTorch in the backward pass."""

    @staticmethod
    def forward(ctx: Any, pre: Float[Tensor, "*batch C"], p: float | Tensor, eps: float) -> Float[Tensor, ""]:
        rows = pre.numel() // pre.shape[-1]
        ctx.p, ctx.eps, ctx.rows = p, eps, rows
        ctx.has_slope = native.serves(pre) and not isinstance(p, Tensor)
        if not ctx.has_slope:
            ctx.p = p if isinstance(p, Tensor) else torch.full((), p, dtype=pre.dtype, device=pre.device)  # a number is compiled for anew
            ctx.save_for_backward(pre)
            return _minimality(pre, ctx.p, eps) / rows
        pre = pre.contiguous()
        slope, sums = torch.empty_like(pre), pre.new_empty(native.units(pre))
        native.minimality(len(sums), pre, slope, sums, pre.numel(), p, eps)
        ctx.save_for_backward(slope)
        return sums.sum() / rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, ""]) -> tuple[Tensor, None, None]:
        (saved,) = ctx.saved_tensors
        scale = grad / ctx.rows
        return saved * scale if ctx.has_slope else _minimality_slope(saved, scale, ctx.p, ctx.eps), None, None


@fusible
def _minimality(pre: Tensor, p: Tensor, eps: float) -> Tensor:
    return ((upper(pre) + eps).pow(p) - eps**p).sum()


@fusible
def _minimality_slope(pre: Tensor, scale: Tensor, p: Tensor, eps: float) -> Tensor:
    slope = scale * p * (upper(pre) + eps).pow(p - 1) * torch.where(pre > 1, LEAK, 1.0)
    return torch.where(pre <= 0, 0, slope)


def annealed_p(losses: Losses, step: int, steps: int) -> float:
    """Minimality's power p at `step`: linear from p_start at step 0 to p_final at step `steps` - 1."""
    return losses.p_start + (losses.p_final - losses.p_start) * min(1.0, step / max(1, steps - 1))


def _of_step(known: LossInputs) -> Float[Tensor, ""]:
    there = known.batch.present
    share = 1.0 if there is None else there.to(known.target.logits.dtype).mean()
    return minimality(known.pre, p=known.p, eps=known.config.losses.minimality_eps, present=share)


register(DirectLoss("minimality", _of_step))
