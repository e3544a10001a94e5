"""Held-out batches of a run (its training data, if it has no others) with what every analysis needs.

That is the target's outputs, the importances, and the role of each position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.errors import ConfigError
from paramlens.method.batch import Batch, Inputs
from paramlens.method.decomposition import Decomposition, Plan, TargetRun
from paramlens.method.evaluate import importances
from paramlens.method.losses.divergence import LossAt
from paramlens.method.losses.reconstruction import stack_size
from paramlens.method.masks import Replacement
from paramlens.method.task import Task
from paramlens.runs.rundir import Run

ALL_POSITIONS = "all"
"""The single role of a task without roles."""


@dataclass(frozen=True)
class HeldOut:
    """One held-out batch of a run. To save memory, `target` keeps only the logits at the positions of the loss.

    g: site name → (batch, pos, C) in [0, 1]. roles: indices into `role_names`, shaped as the leading axes of g; -1: no role.
    """

    batch: Batch
    target: TargetRun
    g: dict[str, Tensor]
    roles: Tensor

    @property
    def positions(self) -> int:
        """Number of present positions of the batch."""
        present = self.batch.present
        return self.roles.numel() if present is None else int(present.sum())

    def at_present(self, values: Float[Tensor, "*batch C"]) -> Float[Tensor, "position C"]:
        """The rows of `values` at present positions; means over positions are taken over these rows."""
        return values.flatten(0, -2) if self.batch.present is None else values[self.batch.present]

    @property
    def masked(self) -> Plan:
        """The plan of the masked model: every site is replaced, with masks g."""
        return {site: Replacement(value) for site, value in self.g.items()}


def data_of(run: Run) -> Task:
    """The run's task. Raises `ConfigError` for a run on your own model that was opened without batches."""
    if run.task is None:
        raise ConfigError(f"{run.path}: no data to look at; open_run(path, model=..., batches=...)")
    return run.task


def held_out(run: Run, *, batches: int, task: Task | None = None) -> list[HeldOut]:
    """The first `batches` batches of the stream that all analyses share, so that their numbers are of the same sequences.

    task: source of the batches. Defaults to the run's own. Raises `ConfigError` for fewer than one batch.
    """
    task = task or data_of(run)
    if batches < 1:
        raise ConfigError(f"batches {batches}: give 1 or more")
    data: list[HeldOut] = []
    for index in range(min(batches, task.held_out or batches)):
        batch = task.batch(index, "circuit").to(run.decomposition.device)
        target, g = importances(run.decomposition, run.importance, batch)
        logits = LossAt(run.config.last_token_only, batch.present).logits(target.logits).clone()
        data.append(HeldOut(batch, TargetRun(logits, {}), g, _roles(batch, g)))
    return data


def divergences(
    decomposition: Decomposition, inputs: Inputs, plans: Sequence[Plan], *, at: LossAt, log_probs: Float[Tensor, "*batch token"]
) -> list[float]:
    """KL(target ‖ plan) in nats of every plan on one batch, `stack_size` plans at a time. log_probs: the target's, where the loss is."""
    size, values = stack_size(log_probs.numel(), device=log_probs.device.type), list[float]()
    for start in range(0, len(plans), size):
        values += at.divergence(log_probs, decomposition(inputs, plans[start : start + size])).tolist()
    return values


def role_names(task: Task) -> list[str]:
    return list(task.roles) or [ALL_POSITIONS]


def _roles(batch: Batch, g: Mapping[str, Tensor]) -> Tensor:
    """Role index of each position; -1: no role."""
    if batch.roles is not None:
        return batch.roles
    first = next(iter(g.values()))
    roles = torch.zeros(first.shape[:-1], dtype=torch.long, device=first.device)
    return roles if batch.present is None else roles.masked_fill(~batch.present, -1)
