"""Agreement between runs: whether different seeds find the same subcomponents in the same target."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from paramlens.analysis.held_out import HeldOut, data_of, held_out
from paramlens.display.result import Result
from paramlens.display.tables import Cell, Table, columns, figure, row, shaded, site_cell
from paramlens.errors import ConfigError, RunDirError
from paramlens.kernels.machine import machine
from paramlens.method.decomposition import Decomposition
from paramlens.method.generators import generator
from paramlens.method.settings import Init
from paramlens.method.sites import at_rest
from paramlens.method.start import initialise
from paramlens.method.threshold import ACTIVE, require_threshold
from paramlens.runs.rundir import Run


@dataclass(frozen=True)
class SiteAgreement:
    """How alike the subcomponents of two runs are at a site, in [0, 1]; 1: the same ones, active at the same tokens.

    Σ over matched pairs of (their importances) × (their similarity), over the importance of all of them: one that has no partner counts
    as unlike. Importance is the mean of g over all positions. Subcomponents that are active nowhere take no part; where none is active in
    either run there is nothing to compare, and each number is None.
    """

    agreement: float | None
    """Matched by, and the mean of, direction and pattern."""
    direction: float | None
    """Matched by cos(u, u') · cos(v, v') alone, the cosine between two rank-1 matrices; negative ones count as 0."""
    pattern: float | None
    """Matched by the correlation of g over all tokens alone, negative ones counted as 0."""
    chance: float | None
    """`direction` against as many parts of W's SVD under a random rotation, with the same importances: what the same weight alone gives."""
    parts: tuple[float, float]
    """Subcomponents active somewhere, in either run."""
    matches: list[tuple[int, int, float]]
    """Subcomponent of the one, of the other, and their similarity, as `agreement` matches them; none for a mean over pairs."""


@dataclass(frozen=True, repr=False)
class Agreement(Result):
    """Agreement between runs that decompose the same target, at every site."""

    runs: list[str]
    threshold: float
    sequences: int
    sites: dict[str, SiteAgreement]
    """Site → mean over all pairs of runs."""
    pairs: list[dict[str, SiteAgreement]]
    """One for every pair of runs, in the order (0, 1), (0, 2), …"""
    init: str
    """Where U and V started. A start from the SVD is the same for every seed, and flatters the agreement."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> str:
        mean = _average([site.agreement for site in self.sites.values()])
        return f"{len(self.runs)} runs, {len(self.sites)} sites: {figure(mean, 3)} on average, in [0, 1]"

    def tables(self) -> tuple[Table, ...]:
        """One row a site: agreement, and by direction and pattern alone, mean over the pairs of runs."""
        pairs = f"{len(self.pairs)} pair{'s' if len(self.pairs) > 1 else ''}"
        flattered = "every seed started from the same singular vectors, which flatters the agreement; init.kind svd_rotated does not"
        rows = tuple(
            (
                site_cell(name),
                Cell("-", "faint") if site.agreement is None else shaded(f"{site.agreement:.3f}", site.agreement, 1.0),
                *row(*(figure(value, 3) for value in (site.direction, site.chance, site.pattern))),
                Cell(f"{site.parts[0]:.1f}, {site.parts[1]:.1f}"),
            )
            for name, site in self.sites.items()
        )
        return (
            Table(
                f"Agreement of {len(self.runs)} runs, mean over {pairs}, in [0, 1]",
                columns("site", "agreement", "direction", "by chance", "pattern", "parts"),
                rows,
                notes=(Cell(flattered, "warn"),) if self.init == "svd" else (),
            ),
        )


@torch.no_grad()
def agreement(runs: Sequence[Run], *, threshold: float = ACTIVE, batches: int = 16) -> Agreement:
    """Match the subcomponents of every two of `runs` by the Hungarian method, on the first run's held-out sequences.

    A subcomponent takes part where its g exceeds `threshold` at one token at least. Raises `ConfigError` for fewer than two runs or a
    first one without data, and `RunDirError` for runs of different targets or sites.
    """
    if len(runs) < 2:
        raise ConfigError("agreement: give two runs or more")
    require_threshold(threshold)
    first = runs[0]
    task = data_of(first)
    for run in runs[1:]:
        if run.info["target"]["sha256"] != first.info["target"]["sha256"]:
            raise RunDirError(f"{run.path}: decomposes another target than {first.path}; compare runs that were given the same target")
        if run.decomposition.names != first.decomposition.names:
            raise RunDirError(f"{run.path}: its sites are not those of {first.path}; compare runs of the same sites")
    parts: list[dict[str, _Parts]] = []
    sequences = 0
    for run in runs:
        with at_rest(task.model), machine(run.config):
            data = held_out(run, task=task, batches=batches)
            sequences = sum(len(held.roles) for held in data)
            parts.append(_parts(run, data, threshold))
    rotated = _rotated(first.decomposition)
    pairs = [
        {site: _compared(parts[i][site], parts[j][site], rotated[site]) for site in parts[0]} for i, j in combinations(range(len(runs)), 2)
    ]
    return Agreement(
        runs=[str(run.path) for run in runs],
        threshold=threshold,
        sequences=sequences,
        sites={site: _mean([pair[site] for pair in pairs]) for site in parts[0]},
        pairs=pairs,
        init=first.config.init.kind,
    )


@dataclass(frozen=True)
class _Parts:
    """The subcomponents of a site that are active somewhere: unit reads and writes, g at every token, mean g."""

    index: list[int]
    reads: Float[Tensor, "part d_in"]
    writes: Float[Tensor, "part d_out"]
    g: Float[Tensor, "part token"]

    @property
    def importance(self) -> Float[Tensor, "part"]:
        return self.g.mean(1)

    @property
    def pattern(self) -> Float[Tensor, "part token"]:
        """Centred and of length 1; 0 where g is the same at every token."""
        centred = self.g - self.g.mean(1, keepdim=True)
        return centred / centred.norm(dim=1, keepdim=True).clamp(min=torch.finfo(centred.dtype).tiny)


def _parts(run: Run, data: Sequence[HeldOut], threshold: float) -> dict[str, _Parts]:
    U, V = run.decomposition.U, run.decomposition.V
    parts: dict[str, _Parts] = {}
    for site in run.decomposition.names:
        g = torch.cat([held.at_present(held.g[site]) for held in data]).T.double()
        active = (g > threshold).any(1).nonzero()[:, 0]
        reads, writes = U[site].T[active].double(), V[site][active].double()
        parts[site] = _Parts(active.tolist(), _unit(reads), _unit(writes), g[active])
    return parts


def _unit(rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)  # a part that writes nothing is like none


def _rotated(decomposition: Decomposition) -> dict[str, tuple[Tensor, Tensor]]:
    """Reads and writes of every site's subcomponents, as a random rotation of the SVD starts them."""
    start = Decomposition(decomposition.model, decomposition.sites, C=decomposition.C)
    initialise(start, Init(kind="svd_rotated"), generator=generator("chance"))
    return {site: (_unit(start.U[site].T.double()), _unit(start.V[site].double())) for site in start.names}


def _compared(a: _Parts, b: _Parts, rotated: tuple[Tensor, Tensor]) -> SiteAgreement:
    direction = _cosines(a, b.reads, b.writes)
    pattern = (a.pattern @ b.pattern.T).clamp(min=0)
    weight = a.importance[:, None] + b.importance[None, :]
    whole = (a.importance.sum() + b.importance.sum()).item()

    def matched(similarity: Tensor) -> tuple[float | None, list[tuple[int, int, float]]]:
        rows, columns = linear_sum_assignment((weight * similarity).cpu().numpy(), maximize=True)
        score = (weight * similarity).cpu()[rows, columns].sum().item() / whole if whole else None
        return score, [(a.index[i], b.index[j], similarity[i, j].item()) for i, j in zip(rows, columns, strict=True)]

    score, matches = matched((direction + pattern) / 2)
    return SiteAgreement(
        agreement=score,
        direction=matched(direction)[0],
        pattern=matched(pattern)[0],
        chance=matched(_cosines(a, *(side[b.index] for side in rotated)))[0],
        parts=(float(len(a.index)), float(len(b.index))),
        matches=matches,
    )


def _cosines(a: _Parts, reads: Float[Tensor, "other d_in"], writes: Float[Tensor, "other d_out"]) -> Float[Tensor, "part other"]:
    return ((a.reads @ reads.T) * (a.writes @ writes.T)).clamp(min=0)


def _mean(pairs: Sequence[SiteAgreement]) -> SiteAgreement:
    def mean(name: str) -> float | None:
        return _average([getattr(pair, name) for pair in pairs])

    counts = [sum(pair.parts[side] for pair in pairs) / len(pairs) for side in (0, 1)]
    return SiteAgreement(mean("agreement"), mean("direction"), mean("pattern"), mean("chance"), (counts[0], counts[1]), matches=[])


def _average(values: Sequence[float | None]) -> float | None:
    """Mean of the values that there are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
