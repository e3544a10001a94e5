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
from paramlens.method.losses.adversarial import sourced_plan
from paramlens.method.losses.divergence import LossAt
from paramlens.method.losses.reconstruction import stack_size
from paramlens.method.masks import Replacement
from paramlens.method.sources import climbed, fresh_sources

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
    """The largest KL(target ‖ masked), in nats, found by projected gradient ascent over masks r = g + (1 - g) s, s in [0, 1].

    There is one source s per subcomponent, shared by all sequences and positions of the batch, and one for m_Δ if Δ is a component. So
    s only rescales what the decomposition calls unneeded, and cannot fit a single sequence. Starts at s ~ U(0, 1); a step adds
    `step_size` times the sign of the gradient and clamps the result to [0, 1]. inputs: the inputs of the masked runs.
    """
    attacked = _Attacked(decomposition, inputs, g, at, at.log_probs(target.logits))
    climb = _Climb(attacked, fresh_sources(g, groups=1, delta=decomposition.delta, generator=generator), step_size)
    for _ in range(steps + 1):
        climb.step()
    return climb.best.item()


@dataclass(frozen=True)
class _Attacked:
    """What is attacked: a decomposition on one batch, with its importances g."""

    decomposition: Decomposition
    inputs: Inputs
    g: Mapping[str, Tensor]
    at: LossAt
    log_probs: Tensor

    def divergences(self, plans: Sequence[Plan]) -> Float[Tensor, "plan"]:
        return self.at.divergence(self.log_probs, self.decomposition(self.inputs, plans))

    def plan(self, sources: Mapping[str, Tensor], start: int) -> dict[str, Replacement]:
        of_start = {site: value[start : start + 1] for site, value in sources.items()}
        return sourced_plan(self.g, of_start, delta=self.decomposition.delta)


class _Climb:
    """Sign ascent from several starts at once. best: largest KL of each start so far; worst: the sources at which it was found."""

    def __init__(self, attacked: _Attacked, sources: Mapping[str, Float[Tensor, "start source"]], step_size: float) -> None:
        self.attacked, self.step_size = attacked, step_size
        self.s = dict(sources)
        self.worst = {site: value.clone() for site, value in sources.items()}
        self.best = torch.full((len(next(iter(sources.values()))),), -torch.inf)
        self.at_once = stack_size(attacked.log_probs.numel(), device=attacked.log_probs.device.type)

    def step(self) -> None:
        """Measure the KL at the sources, and move every source one step up, as many starts in a pass as fit."""
        for first in range(0, len(self.best), self.at_once):
            own = slice(first, first + self.at_once)
            with torch.enable_grad():
                leaves = {site: value[own].clone().requires_grad_() for site, value in self.s.items()}
                found = self.attacked.divergences([self.attacked.plan(leaves, start) for start in range(len(self.best[own]))])
                slopes = torch.autograd.grad(found.sum(), list(leaves.values()))
            better = found.detach().cpu() > self.best[own]
            self.best[own] = torch.where(better, found.detach().cpu(), self.best[own])
            for site, moved in climbed(leaves, slopes, self.step_size).items():
                at = leaves[site].detach()
                self.worst[site][own] = torch.where(better.to(at.device)[:, None], at, self.worst[site][own])
                self.s[site][own] = moved


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
    lacking: if no subcomponent could be turned on, a text that says what the figures then are. None: some could.
    """

    rungs: list[Rung]
    all_off: float
    sites: dict[str, float]
    lacking: str | None


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
    attacked = _Attacked(decomposition, inputs, g, at, at.log_probs(target.logits))
    climb = _Climb(attacked, fresh_sources(g, groups=starts, delta=decomposition.delta, generator=generator), step_size)
    all_off = attacked.divergences([{site: Replacement(torch.zeros_like(value)) for site, value in g.items()}])[0].item()
    rungs = list[Rung]()
    for step in range(steps[-1] + 1):
        climb.step()
        if step in steps:
            most = climb.best.max().item()
            rungs.append(Rung(step, climb.best[0].item(), most, most / all_off if all_off > 0 else None))
    plan = attacked.plan(climb.worst, int(climb.best.argmax()))
    without = [attacked.divergences([plan | {site: Replacement(value)}])[0].item() for site, value in g.items()]
    drops = {site: climb.best.max().item() - each for site, each in zip(g, without, strict=True)}
    return Attack(rungs, all_off, drops, _lacking(decomposition, g, at))


@torch.no_grad()
def _lacking(decomposition: Decomposition, g: Mapping[str, Float[Tensor, "*batch C"]], at: LossAt) -> str | None:
    """A text if no mask of a subcomponent can be moved to an effect: each has g = 1 at all positions, or has been merged and writes 0."""
    for site, value in g.items():
        off_somewhere = (value if at.present is None else value[at.present]).flatten(0, -2).lt(1).any(0)
        if (off_somewhere & decomposition.V[site].any(1)).any():
            return None
    what = "no subcomponent can be turned on: each has importance 1 at every position, or has been merged"
    if decomposition.delta:
        return f"{what}; the search moves the remainders Δ alone"
    return f"{what}, and no remainder is a component; with nothing to move, the figures are those of the importances"
