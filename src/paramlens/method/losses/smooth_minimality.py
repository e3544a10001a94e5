"""Minimality as a smooth count of active subcomponents; one that is often active costs more. From the paper's successors (2026)."""

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.method.importance.sigmoids import upper
from paramlens.method.losses.loss import DirectLoss, LossInputs, register
from paramlens.method.settings import Smooth


def smooth_minimality(
    pre: Float[Tensor, "*batch C"], *, width: float, settings: Smooth, present: Float[Tensor, ""] | float = 1.0
) -> Float[Tensor, ""]:
    """Σ_c f_c (1 + b log2(1 + a f_c)) of one site, where f_c is the mean of φ = g² / (g² + w²) over batch and positions.

    g = upper(pre). φ in [0, 1) rises smoothly and is 1/2 where g is the width w; so f_c is about the share of positions where c is on. b is
    `settings.frequency_weight`, a `settings.frequency_scale`: a part that is on everywhere costs up to 1 + b log2(1 + a).
    width: w > 0. present: the share of positions that count, in (0, 1]; at all others `pre` is 0, where φ is 0.
    """
    squared = upper(pre).square()
    often = (squared / (squared + width**2)).flatten(0, -2).mean(0) / present
    return (often * (1 + settings.frequency_weight * torch.log2(1 + settings.frequency_scale * often))).sum()


def annealed_width(settings: Smooth, step: int, steps: int) -> float:
    """The width w at `step`: linear from `settings.start` at step 0 to `settings.final` at step `steps` - 1."""
    return settings.start + (settings.final - settings.start) * min(1.0, step / max(1, steps - 1))


def _of_step(known: LossInputs) -> Float[Tensor, ""]:
    there, settings = known.batch.present, known.config.smooth
    share = 1.0 if there is None else there.to(known.target.logits.dtype).mean()
    width = annealed_width(settings, known.step, known.config.steps)
    return torch.stack([smooth_minimality(pre, width=width, settings=settings, present=share) for pre in known.pre.values()]).sum()


register(DirectLoss("smooth_minimality", _of_step))
