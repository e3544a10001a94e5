"""Reconstruction under the worst masks found by gradient ascent. Stochastic masks alone do not show the worst case.

`adversarial_recon` climbs from one start. One start misleads: another finds ten times as much. `attack` climbs from several, random ones
and corners, reports what is found after more and more steps, and which site it is found at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.method.batch import Inputs
from paramlens.method.decomposition import Decomposition, Plan, TargetRun
from paramlens.method.losses.adversarial import fresh_sources, sourced_plan
from paramlens.method.losses.divergence import LossAt
from paramlens.method.losses.reconstruction import stack_size
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


STARTS = 8
"""Number of starts of an attack: half of them uniform, half at corners, where every source is 0 or 1."""


@dataclass(frozen=True)
class Rung:
    """The largest KL(target ‖ masked) found in up to `steps` steps of ascent, in nats.

    one_start: by the first start alone. worst: by the worst of all. share: worst / KL with everything off; None: that is 0.
    """

    steps: int
    one_start: float
    worst: float
    share: float | None


@dataclass(frozen=True)
class Attack:
    """What an attack on one batch found.

    all_off: KL with every subcomponent off, in nats. sites: site → by how many nats the worst KL falls when the masks of this
    site alone are set back to g; the site with the largest figure is the one that is attacked.
    """

    rungs: list[Rung]
    all_off: float
    sites: dict[str, float]


def attack(
    decomposition: Decomposition,
    inputs: Inputs,
    target: TargetRun,
    g: Mapping[str, Float[Tensor, "*batch C"]],
    *,
    at: LossAt,
    generator: torch.Generator,
    steps: Sequence[int] = (STEPS,),
    starts: int = STARTS,
    step_size: float = STEP_SIZE,
) -> Attack:
    """Attack one batch from `starts` starts, all in stacked passes, and report it at each number of `steps`, in ascending order.

    Masks are r = g + (1 - g) s, and m_Δ is a source too if Δ is a component. A source is shared by all sequences and positions, as in
    `adversarial_recon`, and climbs in the same way.
    """
    log_probs = at.log_probs(target.logits)

    def divergences(plans: Sequence[Plan]) -> Float[Tensor, "plan"]:
        return at.divergence(log_probs, decomposition(inputs, plans))

    def plan_of(sources: Mapping[str, Tensor], start: int) -> dict[str, Replacement]:
        return sourced_plan(g, {site: value[start : start + 1] for site, value in sources.items()}, delta=decomposition.delta)

    at_once = stack_size(log_probs.numel(), device=log_probs.device.type)
    s = fresh_sources(g, groups=starts, delta=decomposition.delta, generator=generator)
    best, worst = torch.full((starts,), -torch.inf), {site: value.clone() for site, value in s.items()}
    rungs = list[Rung]()
    all_off = divergences([{site: Replacement(torch.zeros_like(value)) for site, value in g.items()}])[0].item()
    for step in range(steps[-1] + 1):
        for first in range(0, starts, at_once):
            own = slice(first, first + at_once)
            with torch.enable_grad():
                leaves = {site: value[own].clone().requires_grad_() for site, value in s.items()}
                found = divergences([plan_of(leaves, start) for start in range(len(best[own]))])
                slopes = torch.autograd.grad(found.sum(), list(leaves.values()))
            better = found.detach().cpu() > best[own]
            best[own] = torch.where(better, found.detach().cpu(), best[own])
            for (site, leaf), slope in zip(leaves.items(), slopes, strict=True):
                worst[site][own] = torch.where(better.to(leaf.device)[:, None], leaf.detach(), worst[site][own])
                s[site][own] = (leaf.detach() + step_size * slope.sign()).clamp(0, 1)
        if step in steps:
            most = best.max().item()
            rungs.append(Rung(step, best[0].item(), most, most / all_off if all_off > 0 else None))
    start = int(best.argmax())
    plan = plan_of(worst, start)
    without = [divergences([plan | {site: Replacement(value)}])[0].item() for site, value in g.items()]
    return Attack(rungs, all_off, {site: best.max().item() - each for site, each in zip(g, without, strict=True)})
