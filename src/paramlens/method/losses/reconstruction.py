"""The reconstruction losses (eqs. 2, 3 and 5 to 8): all are KL(target ‖ masked), listed in `RECONSTRUCTIONS`.

They differ in *which sites are replaced* and *by which mask*. Plans of all enabled losses are stacked and run in few passes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.kernels import native
from paramlens.kernels.transfer import to_device
from paramlens.method.decomposition import Plan
from paramlens.method.losses.loss import Loss, LossInputs, register
from paramlens.method.masks import Replacement, remainder_noise, site_subsets, subset_shape
from paramlens.method.settings import Losses

CPU_STACK = 2**21
"""Number of logits in one pass on a CPU."""


@dataclass(frozen=True)
class Reconstruction(Loss):
    """Mean KL(target ‖ masked), in nats, over plans that replace some sites.

    sites: all in one plan, each alone in its own plan, or one random subset.
    mask: r = g + (1 - g) u ("stochastic"), or g ("importance").
    """

    sites: Literal["all", "each", "subset"]
    mask: Literal["stochastic", "importance"]

    def plans(
        self,
        g: Mapping[str, Float[Tensor, "*batch C"]],
        *,
        samples: int = 1,
        layerwise_sites: int | Literal["all"] = "all",
        partial_scope: Literal["forward", "sequence", "position"] = "forward",
        delta: bool = False,
        generator: torch.Generator,
    ) -> Iterator[Plan]:
        """The plans whose mean divergence is this loss, or an unbiased estimate of it.

        Stochastic plans are drawn `samples` times, eq. 5 once. Layerwise plans replace each site, or each of `layerwise_sites` drawn ones.
        delta: whether Δ is a component: its mask is then U(0, 1) in stochastic plans, and 0 where the masks are g.
        """
        for _ in range(self._draws(samples)):
            if self.mask == "stochastic":
                keys = torch.randint(2**31, (len(g),), generator=generator, device=generator.device).tolist()
                replacements = {site: Replacement(value, key) for (site, value), key in zip(g.items(), keys, strict=True)}
                if delta:
                    keys = torch.randint(2**31, (len(g),), generator=generator, device=generator.device).tolist()
                    replacements = {
                        site: replace(each, remainder=remainder_noise(key, each.g))
                        for (site, each), key in zip(replacements.items(), keys, strict=True)
                    }
            else:
                replacements = {site: Replacement(value) for site, value in g.items()}
            if self.sites == "all":
                yield replacements
            elif self.sites == "each":
                order = list(replacements)
                if layerwise_sites != "all" and layerwise_sites < len(order):
                    drawn = torch.randperm(len(order), generator=generator, device=generator.device)[:layerwise_sites]
                    order = [order[i] for i in drawn.tolist()]
                yield from ({site: replacements[site]} for site in order)
            else:
                yield _subset(replacements, partial_scope, generator)

    def count(self, settings: Losses, sites: int) -> int:
        """Number of plans in one step of a decomposition with this many sites."""
        alone = sites if settings.layerwise_sites == "all" else min(sites, settings.layerwise_sites)
        return self._draws(settings.samples) * (alone if self.sites == "each" else 1)

    def _draws(self, samples: int) -> int:
        return samples if self.mask == "stochastic" else 1


def _subset(
    replacements: Mapping[str, Replacement], scope: Literal["forward", "sequence", "position"], generator: torch.Generator
) -> dict[str, Replacement]:
    """The replacements at a random subset M of the sites (eq. 5), drawn once for each forward, sequence or position."""
    g = next(iter(replacements.values())).g
    chosen = site_subsets(len(replacements), subset_shape(scope, tuple(g.shape[:-1])), generator)
    if scope == "forward":
        return {site: each for (site, each), inside in zip(replacements.items(), chosen, strict=True) if inside}
    inside = to_device(chosen, g.device)
    return {site: replace(each, where=where) for (site, each), where in zip(replacements.items(), inside, strict=True)}


RECONSTRUCTIONS: dict[str, Reconstruction] = {
    loss.name: register(loss)
    for loss in (
        Reconstruction("stochastic_recon", "all", "stochastic"),  # eq. 2
        Reconstruction("stochastic_recon_layerwise", "each", "stochastic"),  # eq. 3
        Reconstruction("recon", "all", "importance"),  # L_recon, §4
        Reconstruction("recon_layerwise", "each", "importance"),  # Table 1c
        Reconstruction("recon_partial", "subset", "importance"),  # eqs. 5, 7
        Reconstruction("stochastic_recon_partial", "subset", "stochastic"),  # eqs. 6, 8
    )
}


def reconstruction_backward(
    known: LossInputs, losses: Sequence[Reconstruction]
) -> tuple[dict[str, Float[Tensor, ""]], dict[str, Float[Tensor, "*batch C"]]]:
    """The losses in nats, and for each site the gradient of Σ coefficient × loss with respect to g (Algorithm 3, lines 4, 5 and 8).

    The gradients with respect to U and V are added to their `.grad`. Plans run in few stacked passes, each followed at once by its
    backward pass, so that memory holds one pass at a time. Under `torch.no_grad` there are no gradients.
    """
    if not losses:
        return {}, {}
    leaves = {site: value.detach().requires_grad_() for site, value in known.g.items()}
    for leaf in leaves.values():
        if leaf.is_contiguous() and native.serves(leaf):
            leaf.grad = torch.zeros_like(leaf)  # the compiled product adds to it
    plans = _plans(known, losses, leaves)
    count = Counter(name for name, _ in plans)
    target_log_probs = known.at.log_probs(known.target.logits)
    divergences: dict[str, list[Tensor]] = {loss.name: [] for loss in losses}
    size = stack_size(target_log_probs.numel(), device=target_log_probs.device.type)
    for start in range(0, len(plans), size):
        names, stack = zip(*plans[start : start + size], strict=True)
        weights = [getattr(known.config.losses, name) / count[name] for name in names]
        for name, value in zip(names, _stack_backward(known, stack, weights, target_log_probs), strict=True):
            divergences[name].append(value)
    gradients = {site: leaf.grad for site, leaf in leaves.items() if leaf.grad is not None}
    return {name: torch.stack(values).mean() for name, values in divergences.items()}, gradients


def _plans(known: LossInputs, losses: Sequence[Reconstruction], leaves: Mapping[str, Tensor]) -> list[tuple[str, Plan]]:
    """The plans of all losses, each with the name of its loss, in the order in which they are stacked."""
    settings, plans = known.config.losses, list[tuple[str, Plan]]()
    for loss in losses:
        drawn = loss.plans(
            leaves,
            samples=settings.samples,
            layerwise_sites=settings.layerwise_sites,
            partial_scope=settings.partial_scope,
            delta=known.decomposition.delta,
            generator=known.generator(loss.name),
        )
        plans += [(loss.name, {site: replace(each, sink=leaves[site].grad) for site, each in plan.items()}) for plan in drawn]
    entry = known.decomposition.entry
    return sorted(plans, key=lambda each: (entry(each[1]), -len(each[1])))  # plans of all sites together: they read every g


def _stack_backward(known: LossInputs, plans: Sequence[Plan], weights: Sequence[float], target_log_probs: Tensor) -> Float[Tensor, "plan"]:
    """The plans' divergences in nats, from one pass; gradients of their weighted sum are added to `.grad` of U, V and every g."""
    inputs = known.task.loss_inputs(known.batch, last_token_only=known.config.last_token_only)
    divergences = known.at.divergence(target_log_probs, known.decomposition(inputs, plans, known.target))
    if divergences.requires_grad:
        torch.stack([weight * value for weight, value in zip(weights, divergences, strict=True)]).sum().backward()
    return divergences.detach()


def stack_size(logits: int, *, device: str) -> int:
    """Number of plans in one pass, given the number of logits of one: on a CPU as many as fit into the cache, elsewhere all."""
    return max(1, CPU_STACK // logits) if device == "cpu" else 2**20
