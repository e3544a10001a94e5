"""KL on a second stream of data, where what was found on the first must not matter. Ours; the paper has no such loss."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.method.batch import Batch
from paramlens.method.decomposition import Decomposition
from paramlens.method.losses.divergence import LossAt
from paramlens.method.losses.loss import DirectLoss, LossInputs, register
from paramlens.method.masks import Replacement


def elsewhere_loss(
    decomposition: Decomposition,
    other: Batch,
    g: Mapping[str, Float[Tensor, "sequence *pos C"]],
    *,
    masks: Literal["own", "all"] = "own",
    last_token_only: bool = False,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """KL(target ‖ masked) on the batch `other`, in nats, with all sites replaced and masks r = 1 - s u, u ~ U(0, 1).

    s: how far a subcomponent belongs to one sequence of the decomposed batch: its largest g in that sequence minus its largest g in any
    other (`masks` own), or 1 (all). No gradient reaches g: only the decomposed sequences decide what is important. Δ, if it is a
    component, is fully on.
    """
    target = decomposition.target_run(other.inputs)
    plan: dict[str, Replacement] = {}
    keys = torch.randint(2**31, (len(g),), generator=generator, device=generator.device).tolist()
    for (site, value), key in zip(g.items(), keys, strict=True):
        own = value.new_ones(value.shape[-1]) if masks == "all" else _own(value.detach())
        plan[site] = replace(decomposition.without((1 - own).expand(*target.inputs[site].shape[:-1], -1)), key=key)
    at = LossAt(last_token_only, other.present)
    return at.divergence(at.log_probs(target.logits), decomposition(other.inputs, [plan]))[0]


def _own(g: Float[Tensor, "sequence *pos C"]) -> Float[Tensor, "C"]:
    """How far each subcomponent belongs to one sequence alone, in [0, 1]."""
    most = g.reshape(len(g), -1, g.shape[-1]).amax(1).sort(0, descending=True).values
    return most[0] - most[1] if len(most) > 1 else most[0]


def _of_step(known: LossInputs) -> Float[Tensor, ""]:
    assert known.task.elsewhere is not None
    other = known.task.elsewhere(known.step).to(known.decomposition.device)
    return elsewhere_loss(
        known.decomposition,
        other,
        known.g,
        masks=known.config.losses.elsewhere_masks,
        last_token_only=known.config.last_token_only,
        generator=known.generator("elsewhere"),
    )


register(DirectLoss("elsewhere", _of_step))
