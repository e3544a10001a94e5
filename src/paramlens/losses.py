"""Faithfulness, minimality, and one reconstruction loss with the table of its uses (eqs. 1 to 8).

A reconstruction loss is (which sites are replaced) × (which mask). Plans of all enabled losses run stacked in one forward pass.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from paramlens.config import Losses
from paramlens.decomposition import Decomposition, Plan, Replacement, TargetRun
from paramlens.masks import site_subsets, stochastic_mask, subset_shape
from paramlens.tasks import Inputs


@dataclass(frozen=True)
class Reconstruction:
    """Which sites a plan replaces (all in one plan, each alone in its own, one random subset) and by which mask (r or g)."""

    sites: Literal["all", "each", "subset"]
    mask: Literal["stochastic", "importance"]


RECONSTRUCTIONS: dict[str, Reconstruction] = {
    "stochastic_recon": Reconstruction("all", "stochastic"),  # eq. 2
    "stochastic_recon_layerwise": Reconstruction("each", "stochastic"),  # eq. 3
    "recon": Reconstruction("all", "importance"),  # L_recon, §4
    "recon_layerwise": Reconstruction("each", "importance"),  # Table 1c
    "recon_partial": Reconstruction("subset", "importance"),  # eqs. 5, 7
    "stochastic_recon_partial": Reconstruction("subset", "stochastic"),  # eqs. 6, 8
}


def faithfulness(decomposition: Decomposition) -> Float[Tensor, ""]:
    """Eq. 1: squared error of W - U V, summed over all entries of all sites, divided by the number of entries."""
    U, V = decomposition.U, decomposition.V
    squares = [(site.W - U[site.name] @ V[site.name]).square().sum() for site in decomposition.sites]
    return torch.stack(squares).sum() / sum(site.W.numel() for site in decomposition.sites)


def minimality(importance: Mapping[str, Float[Tensor, "*batch C"]], *, p: float, eps: float) -> Float[Tensor, ""]:
    """Eq. 1: Σ_sites Σ_c ((g + ε)^p - ε^p), mean over batch and positions, for upper importances g >= 0.

    Subtracting ε^p takes out the constant that ε adds (0.06 per subcomponent at p = 0.1, ε = 1e-12); the slope stays at most
    p ε^(p - 1).
    """
    return torch.stack([((g + eps).pow(p) - eps**p).sum(-1).mean() for g in importance.values()]).sum()


def annealed_p(losses: Losses, step: int, steps: int) -> float:
    """The power p of minimality at `step`: linear from p_start at step 0 to p_final at step `steps` - 1."""
    return losses.p_start + (losses.p_final - losses.p_start) * min(1.0, step / max(1, steps - 1))


def loss_positions(logits: Float[Tensor, "*batch token"], *, last_token_only: bool) -> Tensor:
    """The logits that the loss sees: all, or those of the last position (the axis before the tokens, kept)."""
    return logits[..., -1:, :] if last_token_only else logits


def kl_divergence(target_log_probs: Float[Tensor, "*batch token"], logits: Float[Tensor, "plan *batch token"]) -> Float[Tensor, "plan"]:
    """KL(target ‖ masked) in nats for each plan, mean over the loss positions of the batch."""
    log_probs = logits.log_softmax(-1)
    divergence = F.kl_div(log_probs, target_log_probs.expand_as(log_probs), reduction="none", log_target=True)
    return divergence.sum(-1).flatten(1).mean(1)


def reconstruction_plans(
    name: str,
    g: Mapping[str, Float[Tensor, "*batch C"]],
    *,
    samples: int = 1,
    partial_scope: Literal["forward", "sequence", "position"] = "forward",
    generator: Callable[[], torch.Generator],
) -> Iterator[Plan]:
    """The plans whose mean divergence is the loss `name`; stochastic ones and partial ones are drawn `samples` times, eq. 5 once."""
    loss = RECONSTRUCTIONS[name]
    rng = generator()
    for _ in range(samples if loss.mask == "stochastic" else 1):
        masks = {site: stochastic_mask(value, rng) if loss.mask == "stochastic" else value for site, value in g.items()}
        if loss.sites == "all":
            yield {site: Replacement(mask) for site, mask in masks.items()}
        elif loss.sites == "each":
            yield from ({site: Replacement(mask)} for site, mask in masks.items())
        else:
            batch = tuple(next(iter(g.values())).shape[:-1])
            chosen = site_subsets(len(masks), subset_shape(partial_scope, batch), rng)
            if partial_scope == "forward":
                yield {site: Replacement(mask) for (site, mask), inside in zip(masks.items(), chosen, strict=True) if inside}
            else:
                yield {site: Replacement(mask, where=inside) for (site, mask), inside in zip(masks.items(), chosen, strict=True)}


def reconstruction_losses(
    decomposition: Decomposition,
    inputs: Inputs,
    target: TargetRun,
    g: Mapping[str, Float[Tensor, "*batch C"]],
    names: tuple[str, ...],
    *,
    last_token_only: bool,
    samples: int = 1,
    partial_scope: Literal["forward", "sequence", "position"] = "forward",
    generator: Callable[[str], torch.Generator],
) -> dict[str, Float[Tensor, ""]]:
    """Every loss of `names` (nats) from one stacked forward pass; `generator(name)` gives each loss its own random numbers.

    inputs: what the masked runs are given; with `last_token_only` they may ask the model for its last logits alone.
    """
    plans: list[Plan] = []
    slices: dict[str, slice] = {}
    for name in names:
        start = len(plans)
        plans += reconstruction_plans(name, g, samples=samples, partial_scope=partial_scope, generator=lambda name=name: generator(name))
        slices[name] = slice(start, len(plans))
    if not plans:
        return {}
    target_log_probs = loss_positions(target.logits, last_token_only=last_token_only).log_softmax(-1)
    logits = loss_positions(decomposition.masked_run(inputs, plans), last_token_only=last_token_only)
    divergence = kl_divergence(target_log_probs, logits)
    return {name: divergence[part].mean() for name, part in slices.items()}
