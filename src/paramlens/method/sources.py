"""The sources s in [0, 1] of `losses.adversarial`: where a step's ascents begin, and what is kept for the next step.

A source belongs to a group of a batch's rows and to one subcomponent of a site, or to the site's remainder Δ.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paramlens.kernels.transfer import to_device
from paramlens.method.settings import Adversary

Sources = dict[str, Float[Tensor, "group source"]]
"""Site → for each group of rows one source per subcomponent, and a last one for Δ if it is a component."""


def fresh_sources(g: Mapping[str, Float[Tensor, "*batch C"]], *, groups: int, delta: bool, generator: torch.Generator) -> Sources:
    """Sources ~ U(0, 1), drawn anew; in every other group rounded to 0 or 1, so that half of the attacks begin at corners."""
    corners = torch.arange(groups, device=generator.device)[:, None] % 2 == 1
    found: Sources = {}
    for site, value in g.items():
        drawn = torch.rand(groups, value.shape[-1] + delta, generator=generator, device=generator.device, dtype=torch.float64)
        found[site] = to_device(torch.where(corners, drawn.round(), drawn).to(value.dtype), value.device)
    return found


@torch.no_grad()
def climbed(sources: Mapping[str, Tensor], slopes: Sequence[Tensor], step_size: float) -> Sources:
    """One sign ascent: s ← clamp(s + step_size sign ∂KL/∂s, 0, 1). slopes: ∂KL/∂s, in the order of the sites."""
    return {
        site: (value.detach() + step_size * slope.sign()).clamp(0, 1) for (site, value), slope in zip(sources.items(), slopes, strict=True)
    }


class FreshSources:
    """Sources that are drawn anew in every step, `fresh_sources`.

    kept: the sources that a checkpoint holds, for as many groups as `adversary.groups`; empty for this kind.
    """

    def __init__(self) -> None:
        self.kept: Sources = {}

    def first(self, g: Mapping[str, Tensor], *, groups: int, rows: int, delta: bool, generator: torch.Generator) -> Sources:
        """Where the ascents of a step begin: `groups` groups, or `rows` if the batch has fewer rows."""
        return fresh_sources(g, groups=min(groups, rows), delta=delta, generator=generator)

    def last(self, sources: Sources) -> Sources:
        """The sources at which the loss is taken, given those after the step's ascents."""
        return sources

    def after_backward(self, step_size: float) -> None:
        """Take in what the backward pass of the step tells of the sources."""

    def take(self, site: str, order: Int[Tensor, "C"]) -> None:
        """Keep the sources of these subcomponents of a site only, in this order, and that of Δ."""


class PersistentSources(FreshSources):
    """Sources that go on in each step from where the step before left them; the first ones are drawn as fresh ones.

    The loss's own backward pass also gives ∂KL/∂s at the sources it was taken at, and with it one more ascent without a further pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self._leaves: Sources = {}

    def first(self, g: Mapping[str, Tensor], *, groups: int, rows: int, delta: bool, generator: torch.Generator) -> Sources:
        if not self.kept:
            self.kept = fresh_sources(g, groups=groups, delta=delta, generator=generator)
        return {site: value[:rows].clone() for site, value in self.kept.items()}

    def last(self, sources: Sources) -> Sources:
        self._leaves = {site: value.detach().requires_grad_() for site, value in sources.items()}
        return self._leaves

    @torch.no_grad()
    def after_backward(self, step_size: float) -> None:
        for site, leaf in self._leaves.items():
            slope = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            self.kept[site][: len(leaf)] = climbed({site: leaf}, [slope], step_size)[site]
        self._leaves = {}

    def take(self, site: str, order: Int[Tensor, "C"]) -> None:
        if self.kept:
            before = self.kept[site]
            remainder = torch.arange(before.shape[1] - 1, before.shape[1], device=order.device)  # merging needs Δ, whose source is last
            self.kept[site] = before.index_select(1, torch.cat([order, remainder]))


def sources_of(settings: Adversary) -> FreshSources:
    """The sources of a new run."""
    return {"fresh": FreshSources, "persistent": PersistentSources}[settings.sources]()
