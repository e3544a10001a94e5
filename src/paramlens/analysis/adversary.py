"""Reconstruction under the worst masks found by gradient ascent. Stochastic masks alone do not show the worst case."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.method.batch import Inputs
from paramlens.method.decomposition import Decomposition, TargetRun
from paramlens.method.losses.divergence import LossAt
from paramlens.method.masks import Replacement, stochastic_mask

STEPS = 20
"""Number of steps of projected gradient ascent."""
STEP_SIZE = 0.1
"""Change of every entry of u in one step."""


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
    """The largest KL(target ‖ masked), in nats, found by projected gradient ascent over masks r = g + (1 - g) u, u in [0, 1].

    There is one u per subcomponent, shared by all sequences and positions of the batch. So u only rescales what the decomposition
    calls unneeded, and cannot fit a single sequence. Starts at u ~ U(0, 1); a step adds `step_size` times the sign of the gradient
    and clamps the result to [0, 1]. inputs: the inputs of the masked runs.
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
