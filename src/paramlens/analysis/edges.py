"""The effect of each site on later sites: its active subcomponents are removed, and the change at the later sites is measured."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.analysis.held_out import HeldOut, data_of, held_out
from paramlens.display.result import Result
from paramlens.display.tables import Cell, Table, columns, shaded
from paramlens.kernels.machine import machine
from paramlens.method.importance.sigmoids import lower
from paramlens.method.masks import rounded_mask
from paramlens.method.sites import at_rest
from paramlens.method.threshold import ACTIVE, require_threshold
from paramlens.runs.rundir import Run

SMALLEST = 1e-6
"""A relative change below this is rounding error, not an edge."""


@dataclass(frozen=True)
class Edge:
    """What a later site (target) loses when an earlier one (source) runs without its subcomponents active at each token, all others on.

    inner: Σ |a' - a| / Σ |a| over the inner activations a of the later site's active subcomponents at the tokens where they are active;
    0: unchanged, 1: the change is as large as a. importance: (Σ g - Σ g') / Σ g over the same; 1: all lost, below 0: gained.
    """

    source: str
    target: str
    inner: float
    importance: float


@dataclass(frozen=True, repr=False)
class Edges(Result):
    """Effects between sites on the evaluated sequences; pairs without an effect are left out."""

    run: str
    step: int
    threshold: float
    sequences: int
    edges: list[Edge]

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> str:
        return f"{self.run}, step {self.step}: {len(self.edges)} edges"

    def tables(self) -> tuple[Table, ...]:
        """Every edge, strongest first."""
        ordered = sorted(self.edges, key=lambda edge: -edge.inner)
        rows = ((Cell(e.source), Cell(e.target), shaded(f"{e.inner:.3f}", e.inner, 1.0), Cell(f"{e.importance:+.3f}")) for e in ordered)
        title = f"Lost by later sites without a site's active subcomponents, {self.sequences} sequences"
        return (Table(title, columns("site", "later site", "inner activation", "importance"), tuple(rows)),)


@torch.no_grad()
def edges(run: Run, *, threshold: float = ACTIVE, batches: int = 4) -> Edges:
    """Measure every pair of sites of `run`. All other sites run the target's own weights. Raises `ConfigError` as `circuit` does."""
    require_threshold(threshold)
    names, task = run.decomposition.names, data_of(run)
    sums = {pair: torch.zeros(4, dtype=torch.float64) for pair in ((a, b) for a in names for b in names if a != b)}
    with at_rest(task.model), machine(run.config):
        data = held_out(run, batches=batches)
        for held in data:
            before = run.decomposition.target_run(held.batch.inputs).inputs
            active = {site: rounded_mask(g, threshold=threshold) for site, g in held.g.items()}
            for source in names:
                after, g = _without(run, held, source, active[source])
                for target in names:
                    if target != source:
                        sums[source, target] += _changes(run, target, before, after, held.g[target], g[target], active[target])
    found = [_edge(source, target, sums[source, target].tolist()) for source, target in sums]
    return Edges(
        run=str(run.path),
        step=run.step,
        threshold=threshold,
        sequences=sum(len(held.target.logits) for held in data),
        edges=[edge for edge in found if edge is not None],
    )


def _without(run: Run, held: HeldOut, site: str, active: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every site's input, and its g, in the target without the active subcomponents of `site`."""
    inputs = run.decomposition.masked_inputs(held.batch.inputs, {site: run.decomposition.without(1 - active)})
    pre = run.importance(run.decomposition.seen(inputs), run.decomposition.U, held.batch.present)
    return inputs, {name: lower(value) for name, value in pre.items()}


def _changes(
    run: Run,
    site: str,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    g: Float[Tensor, "*batch C"],
    g_after: Float[Tensor, "*batch C"],
    active: Float[Tensor, "*batch C"],
) -> Float[Tensor, "4"]:
    """Σ |a' - a|, Σ |a|, Σ g - Σ g', Σ g over the active subcomponents of `site`."""
    a, a_after = (run.decomposition.inner(site, inputs[site]) for inputs in (before, after))
    terms = ((a_after - a).abs(), a.abs(), g - g_after, g)
    return torch.stack([(term * active).sum(dtype=torch.float64).cpu() for term in terms])


def _edge(source: str, target: str, sums: list[float]) -> Edge | None:
    moved, inner, lost, importance = sums
    if not inner or moved / inner < SMALLEST:
        return None
    return Edge(source, target, moved / inner, lost / importance)
