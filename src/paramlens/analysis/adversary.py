"""Reconstruction under masks chosen against it: what stochastic masks, which never meet the worst case, leave unseen."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.method.batch import Inputs
from paramlens.method.decomposition import Decomposition, TargetRun
from paramlens.method.losses.divergence import LossAt
from paramlens.method.masks import Replacement, stochastic_mask

STEPS = 20
"""Steps of projected gradient ascent."""
STEP_SIZE = 0.1
"""Length of a step in every entry of u."""


def adversarial_recon(
    decomposition: Decomposition,
    inputs: Inputs,
    target: TargetRun,
    g: Mapping[str, Float[Tensor, "*batch C"]],
    *,
    at: LossAt,
    generator: torch.Generator,
    steps: int = STEPS,
    step_size: float = STEP_SIZE,
) -> float:
    """The largest KL(target ‖ masked), in nats, met on the way up by projected gradient over masks r = g + (1 - g) u, u in [0, 1].

    One u per subcomponent, shared by all sequences and positions of the batch: so it is a rescaling of what the decomposition says is
    not needed, and cannot fit itself to a sequence. Starts at u ~ U(0, 1); a step adds `step_size` times the sign of the gradient,
    and the result is clamped to [0, 1]. inputs: what the masked runs are given.
    """
    log_probs = at.log_probs(target.logits)
    us = {
        site: torch.rand(value.shape[-1], generator=generator, dtype=torch.float64).to(value).requires_grad_() for site, value in g.items()
    }
    worst = 0.0
    for step in range(steps + 1):
        with torch.enable_grad():
            masked = {site: Replacement(stochastic_mask(value, us[site].expand_as(value))) for site, value in g.items()}
            divergence = at.divergence(log_probs, decomposition(inputs, [masked]))[0]
        worst = max(worst, divergence.item())
        if step == steps:
            break
        gradients = torch.autograd.grad(divergence, list(us.values()))
        with torch.no_grad():
            for u, gradient in zip(us.values(), gradients, strict=True):
                u.add_(step_size * gradient.sign()).clamp_(0, 1)
    return worst
