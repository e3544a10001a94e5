"""The target without a site's active subcomponents, with only these, or with one of its own inputs changed (§6.1)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from paramlens.analysis.attention import attention_along, captured
from paramlens.analysis.held_out import HeldOut
from paramlens.method.decomposition import Decomposition, Plan
from paramlens.method.evaluate import accuracy, mean_over_batches
from paramlens.method.losses.divergence import LossAt
from paramlens.method.masks import Replacement, rounded_mask
from paramlens.method.task import Task


@dataclass(frozen=True)
class Intervention:
    """One change of the target, and the measurements after it."""

    name: str
    """"target", "masked", "<site> removed", "<site> alone", or a change of the target that the task names."""
    site: str | None
    kl: float
    """KL(target ‖ changed) in nats at the loss positions."""
    accuracy: float | None
    """Share of correct answers. None: the task has no answers."""
    attention: dict[str, float]
    """Link → mean attention from its query to its key, in the head where this is largest."""


@torch.no_grad()
def interventions(
    decomposition: Decomposition, task: Task, data: Sequence[HeldOut], *, threshold: float, last_token_only: bool
) -> list[Intervention]:
    """Measure the target, the masked model (masks g), and every change, one at a time.

    removed: at one site, the subcomponents with g > threshold at the token are off and all others on; alone: the reverse. The other sites
    run the target's own weights. Last come the task's own changes, such as no position encoding at a query.
    """
    done = [
        _measured("target", None, decomposition, task, data, [{} for _ in data], last_token_only=last_token_only),
        _measured("masked", None, decomposition, task, data, [held.masked for held in data], last_token_only=last_token_only),
    ]
    for effect in ("removed", "alone"):
        for site in decomposition.names:
            masks = [rounded_mask(held.g[site], threshold=threshold) for held in data]
            plans: list[Plan] = [{site: decomposition.without(1 - mask) if effect == "removed" else Replacement(mask)} for mask in masks]
            done.append(_measured(f"{site} {effect}", site, decomposition, task, data, plans, last_token_only=last_token_only))
    for name, change in task.changes.items():
        changes = [change(held.batch) for held in data]
        done.append(_measured(name, None, decomposition, task, data, [{} for _ in data], last_token_only=last_token_only, changes=changes))
    return done


def _measured(
    name: str,
    site: str | None,
    decomposition: Decomposition,
    task: Task,
    data: Sequence[HeldOut],
    plans: Sequence[Plan],
    *,
    last_token_only: bool,
    changes: Sequence[AbstractContextManager[None]] | None = None,
) -> Intervention:
    divergences, positions = list[float](), list[int]()
    right, sequences = list[float](), list[int]()
    seen: dict[str, list[Tensor]] = {link.name: [] for link in task.links}
    for held, plan, change in zip(data, plans, changes or [nullcontext()] * len(data), strict=True):
        with captured(decomposition.model, task.attention_patterns) as patterns, change:
            logits = decomposition(held.batch.inputs, [plan])
        at = LossAt(last_token_only, held.batch.present)
        positions.append(at.count(held.target.logits))
        divergences += at.divergence(at.log_probs(held.target.logits), logits).tolist()
        if held.batch.answers is not None:
            right.append(accuracy(logits[0], held.batch))
            sequences.append(len(held.batch.answers))
        for link in task.links:
            seen[link.name].append(attention_along(link, patterns, held.roles, task.roles))
    return Intervention(
        name=name,
        site=site,
        kl=max(0.0, mean_over_batches(divergences, positions)),  # below 0 only by rounding
        accuracy=mean_over_batches(right, sequences) if right else None,
        attention={name: torch.cat(values).double().mean(0).max().item() for name, values in seen.items()},
    )
