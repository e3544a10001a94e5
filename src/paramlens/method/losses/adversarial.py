"""KL under masks that are chosen to raise it, so that training also sees masks near the worst case. The paper has no such loss."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.method.losses.loss import DirectLoss, LossInputs, register
from paramlens.method.masks import Replacement, stochastic_mask
from paramlens.method.sources import climbed


def sourced_plan(g: Mapping[str, Float[Tensor, "batch *pos C"]], sources: Mapping[str, Tensor], *, delta: bool) -> dict[str, Replacement]:
    """All sites with masks r = g + (1 - g) s. A group is a run of adjacent rows; its rows and all positions share its sources."""
    plan: dict[str, Replacement] = {}
    for site, value in g.items():
        s = sources[site]
        rows, between = value.shape[0], value.dim() - 2
        of_row = s[torch.arange(rows, device=s.device) * len(s) // rows].view(rows, *[1] * between, -1)
        mask = stochastic_mask(value, of_row[..., : value.shape[-1]].expand_as(value))
        plan[site] = Replacement(mask, remainder=of_row[..., -1].expand(value.shape[:-1]) if delta else None)
    return plan


def adversarial_loss(known: LossInputs) -> Float[Tensor, ""] | None:
    """KL(target ‖ masked) in nats at sources that a few steps of sign ascent have chosen, with gradient to U, V and γ.

    s ← clamp(s + `adversary.step_size` sign ∂KL/∂s, 0, 1), `adversary.ascents` times, from where `known.sources` begins.
    None: before `adversary.start`.
    """
    settings, decomposition = known.config.adversary, known.decomposition
    if known.step < settings.start * known.config.steps:
        return None
    inputs = known.task.loss_inputs(known.batch, last_token_only=known.config.last_token_only)
    target_log_probs = known.at.log_probs(known.target.logits)

    def divergence(g: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> Tensor:
        plan = sourced_plan(g, sources, delta=decomposition.delta)
        return known.at.divergence(target_log_probs, decomposition(inputs, [plan], known.target))[0]

    fixed = {site: value.detach() for site, value in known.g.items()}
    rows, rng = len(next(iter(fixed.values()))), known.generator("adversarial")
    sources = known.sources.first(fixed, groups=settings.groups, rows=rows, delta=decomposition.delta, generator=rng)
    for _ in range(settings.ascents):
        with torch.enable_grad():
            leaves = {site: value.requires_grad_() for site, value in sources.items()}
            slopes = torch.autograd.grad(divergence(fixed, leaves), list(leaves.values()))
        sources = climbed(leaves, slopes, settings.step_size)
    return divergence(known.g, known.sources.last(sources))


register(DirectLoss("adversarial", adversarial_loss))
