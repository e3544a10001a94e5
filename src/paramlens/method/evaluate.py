"""Metrics of a decomposition on a batch; training and analyses both measure with `evaluate`."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paramlens.method.batch import Batch
from paramlens.method.decomposition import Decomposition, Plan, TargetRun
from paramlens.method.generators import generator
from paramlens.method.importance.network import Importance
from paramlens.method.importance.sigmoids import lower
from paramlens.method.losses.divergence import LossAt
from paramlens.method.losses.faithfulness import faithfulness
from paramlens.method.losses.reconstruction import RECONSTRUCTIONS
from paramlens.method.masks import Replacement, rounded_mask
from paramlens.method.task import Task
from paramlens.method.threshold import ACTIVE


@torch.no_grad()
def importances(decomposition: Decomposition, importance: Importance, batch: Batch) -> tuple[TargetRun, dict[str, Tensor]]:
    """The target's run on `batch`, and g (batch, pos, C) in [0, 1] for every site."""
    target = decomposition.target_run(batch.inputs)
    return target, {name: lower(pre) for name, pre in importance(target.seen, decomposition.U, batch.present).items()}


@torch.no_grad()
def evaluate(
    task: Task,
    decomposition: Decomposition,
    batch: Batch,
    target: TargetRun,
    g: Mapping[str, Float[Tensor, "*batch C"]],
    *,
    last_token_only: bool,
    threshold: float = ACTIVE,
    seed: int = 0,
) -> dict[str, float]:
    """Faithfulness (eq. 1), reconstruction losses in nats, and accuracies if the batch has answers.

    recon, recon_layerwise: masks g, all sites or each alone. stochastic_recon: one draw, from `seed`. recon_rounded: every
    subcomponent with g > threshold fully on, all others off. Plans run one by one, so that memory does not grow with the sites.
    """
    inputs, at = task.loss_inputs(batch, last_token_only=last_token_only), LossAt(last_token_only, batch.present)
    target_log_probs = at.log_probs(target.logits)

    def divergence(plan: Plan) -> float:
        return at.divergence(target_log_probs, decomposition(inputs, [plan])).item()

    metrics = {"faithfulness": faithfulness(decomposition).item()}
    for name in ("recon", "recon_layerwise", "stochastic_recon"):
        plans = RECONSTRUCTIONS[name].plans(g, delta=decomposition.delta, generator=generator(seed, "evaluate"))
        values = [divergence(plan) for plan in plans]
        metrics[name] = sum(values) / len(values)
    rounded = {site: Replacement(rounded_mask(value, threshold=threshold)) for site, value in g.items()}
    metrics["recon_rounded"] = divergence(rounded)
    if batch.answers is not None:
        masked = decomposition(inputs, [{site: Replacement(value) for site, value in g.items()}])[0]
        metrics["accuracy_target"] = accuracy(target.logits, batch)
        metrics["accuracy_masked"] = accuracy(masked, batch)
    return metrics


def mean_over_batches(values: Sequence[float], counts: Sequence[int]) -> float:
    """The mean over all positions (or sequences) of several batches, from each batch's mean and number of them."""
    if len(set(counts)) == 1:
        return sum(values) / len(values)
    return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)


def accuracy(logits: Float[Tensor, "batch *pos token"], batch: Batch) -> float:
    """Share of sequences whose most likely token, after the last present position if there are positions, is the batch's answer."""
    last = logits if logits.dim() == 2 else LossAt(last_token_only=True, present=batch.present).logits(logits)[:, 0]
    return (last.argmax(-1) == batch.answers).double().mean().item()


def active_counts(
    g: Mapping[str, Float[Tensor, "*batch C"]], *, present: Bool[Tensor, "*batch"] | None = None, threshold: float = ACTIVE
) -> dict[str, float]:
    """Site name → mean number of active subcomponents per position."""
    share = 1.0 if present is None else present.double().mean().item()
    return {name: (value > threshold).sum(-1, dtype=torch.float32).mean().item() / share for name, value in g.items()}
