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
    """How similar the subcomponents of two runs are at a site, in [0, 1]; 1: the same subcomponents, active at the same tokens.

    Each number is Σ over matched pairs of (sum of their importances) × (their similarity), divided by the importance of all subcomponents;
    one without a partner counts as similarity 0. Importance is the mean of g over all positions. Subcomponents that are active nowhere
    are ignored. None: no subcomponent is active in either run.
    """

    agreement: float | None
    """Matched by the mean of the direction and pattern similarities."""
    direction: float | None
    """Matched by cos(u, u') · cos(v, v') alone, the cosine between two rank-1 matrices; negative values count as 0."""
    pattern: float | None
    """Matched by the correlation of g over all tokens alone; negative values count as 0."""
    chance: float | None
    """Chance level of `direction`: the second run's subcomponents are replaced by a random rotation of W's SVD, same importances."""
    parts: tuple[float, float]
    """Number of subcomponents active somewhere, in the first and in the second run."""
    matches: list[tuple[int, int, float]]
    """(subcomponent of the first run, of the second run, similarity) as `agreement` matches them; empty for a mean over pairs."""


@dataclass(frozen=True, repr=False)
class Agreement(Result):
    """Agreement between runs that decompose the same target, at every site."""

    runs: list[str]
    threshold: float
    sequences: int
    sites: dict[str, SiteAgreement]
    """Site → mean over all pairs of runs."""
    pairs: list[dict[str, SiteAgreement]]
    """One entry for every pair of runs, in the order (0, 1), (0, 2), …"""
    init: str
    """`init.kind`: how U and V were initialised. Initialisation from the SVD is the same for every seed and raises the agreement."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> str:
        mean = _average([site.agreement for site in self.sites.values()])
        return f"{len(self.runs)} runs, {len(self.sites)} sites: {figure(mean, 3)} on average, in [0, 1]"

    def tables(self) -> tuple[Table, ...]:
        """One row per site: overall agreement, and by direction or pattern alone, mean over the pairs of runs."""
        pairs = f"{len(self.pairs)} pair{'s' if len(self.pairs) > 1 else ''}"
        flattered = "every seed started from the same singular vectors, which makes the agreement look higher; use init.kind svd_rotated"
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
    """Match the subcomponents of every pair of `runs` by the Hungarian method, on the first run's held-out sequences.

    A subcomponent counts if its g exceeds `threshold` at one token at least. Raises `ConfigError` for fewer than two runs or a first
    run without data, and `RunDirError` for runs of different targets or sites.
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
    """The subcomponents of a site that are active somewhere: unit vectors u (reads) and v (writes), and g at every token."""

    index: list[int]
    reads: Float[Tensor, "part d_in"]
    writes: Float[Tensor, "part d_out"]
    g: Float[Tensor, "part token"]

    @property
    def importance(self) -> Float[Tensor, "part"]:
        return self.g.mean(1)

    @property
    def pattern(self) -> Float[Tensor, "part token"]:
        """g, centred and scaled to length 1; 0 if g is the same at every token."""
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
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)  # a zero row has similarity 0 to all


def _rotated(decomposition: Decomposition) -> dict[str, tuple[Tensor, Tensor]]:
    """Unit reads and writes at every site, initialised from a random rotation of the SVD."""
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
    """Mean of the values that are not None. None: all of them are None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
