"""A decomposition on inputs of another kind than it is evaluated on. Unless it was trained on such inputs too, its fit says nothing there.

Runs on facts are evaluated on other facts. Runs on tokens are evaluated on their sequences with the tokens of each sequence shuffled.
For other inputs there is no such evaluation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paramlens.analysis.controls import weight_rank
from paramlens.analysis.edit import changed, without_largest, without_random
from paramlens.analysis.held_out import HeldOut, data_of
from paramlens.method.batch import Batch
from paramlens.method.decomposition import Plan, call
from paramlens.method.evaluate import importances
from paramlens.method.generators import generator
from paramlens.method.losses.divergence import LossAt
from paramlens.method.masks import Replacement
from paramlens.runs.rundir import Run

FACTS = 64
"""Maximum number of other facts to evaluate."""


@dataclass(frozen=True)
class OffData:
    """Divergences off the data, in nats. recon: KL(target ‖ masked model), masks g of γ on these inputs. with_remainder: the same with Δ
    fully on; None: Δ is no component.

    removed: KL(target ‖ target without the subcomponents that are active anywhere on the run's data). controls: the same with as many
    slices removed at the same sites, random ones and, if every site has enough, the largest singular ones. If `removed` is below both,
    the subcomponents matter mostly for the run's own data.
    """

    what: str
    sequences: int
    recon: float
    with_remainder: float | None
    removed: float
    controls: dict[str, float]
    parts: int
    """Number of subcomponents active anywhere on the run's data, all sites; with 0, nothing is removed and there are no controls."""


@torch.no_grad()
def off_data(run: Run, data: Sequence[HeldOut], *, threshold: float) -> OffData | None:
    """Measure off the data, on as many sequences as the first batch of `data` has, or on `FACTS` facts. None: no such inputs exist."""
    found = _elsewhere(run, data[0].batch)
    if found is None:
        return None
    what, batch = found
    batch = batch.to(run.decomposition.device)
    try:
        target, g = importances(run.decomposition, run.importance, batch)
    except (IndexError, RuntimeError, ValueError):
        if not run.config.task.given_in_python:
            raise
        return None  # a user's model may reject a token at some position
    at = LossAt(run.config.last_token_only, batch.present)
    log_probs = at.log_probs(target.logits)

    def divergence(logits: Tensor) -> float:
        return at.divergence(log_probs, logits[None]).item()

    def without(weights: Mapping[str, Tensor]) -> float:
        with changed(run.decomposition.model, weights):
            return divergence(call(run.decomposition.model, batch.inputs))

    def masked(plan: Plan) -> float:
        return divergence(run.decomposition(batch.inputs, [plan])[0])

    own, controls, parts = _weights(run, data, threshold)
    return OffData(
        what=what,
        sequences=len(target.logits),
        recon=masked({site: Replacement(value) for site, value in g.items()}),
        with_remainder=masked({site: run.decomposition.without(value) for site, value in g.items()}) if run.decomposition.delta else None,
        removed=without(own),
        controls={name: without(weights) for name, weights in controls.items()},
        parts=parts,
    )


def _elsewhere(run: Run, batch: Batch) -> tuple[str, Batch] | None:
    task = data_of(run)
    if task.other_inputs is not None:
        return task.other_inputs(FACTS)
    if (ids := batch.token_ids) is None:
        return None
    noise = torch.rand(ids.shape, generator=generator("off data")).to(ids.device)
    absent = torch.zeros_like(ids, dtype=torch.bool) if batch.present is None else ~batch.present
    places, order = absent.sort(dim=1, stable=True).indices, noise.masked_fill(absent, 2).argsort(1)  # present positions first in both
    shuffled = ids.scatter(1, places, ids.gather(1, order))
    return f"{task.evaluated_on} sequences with their tokens shuffled", batch.with_token_ids(shuffled)


def _weights(run: Run, data: Sequence[HeldOut], threshold: float) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], int]:
    """(site → weight without its subcomponents that are active somewhere, the same for each control, number of subcomponents)."""
    own, drawn, largest = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    total, has_as_many = 0, True
    for site in run.decomposition.sites:
        g = torch.cat([held.g[site.name].flatten(0, -2) for held in data])
        parts = (g > threshold).any(0).nonzero()[:, 0]
        if not (count := len(parts)):
            continue
        W, U, V = site.W, run.decomposition.U[site.name], run.decomposition.V[site.name]
        own[site.name] = W - U[:, parts] @ V[parts]
        drawn[site.name] = without_random(W, count, generator=generator("off data", site.name))
        largest[site.name] = without_largest(W, count)
        total, has_as_many = total + count, has_as_many and weight_rank(W) >= count
    controls = {"random directions": drawn} | ({"largest singular directions": largest} if has_as_many else {})
    return own, controls if total else {}, total
