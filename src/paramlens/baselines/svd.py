"""Greedy SVD pruning compared with the decomposition (Algorithm 2, Figure 2): the rank that SVD needs for the same divergence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from paramlens.analysis.held_out import HeldOut, data_of, divergences, held_out
from paramlens.display.result import Result
from paramlens.display.tables import Cell, Chart, Column, Line, Table, columns, row, site_cell
from paramlens.errors import ConfigError
from paramlens.kernels.machine import machine
from paramlens.method.decomposition import Decomposition, Plan
from paramlens.method.evaluate import mean_over_batches
from paramlens.method.generators import generator
from paramlens.method.losses.divergence import LossAt
from paramlens.method.masks import Replacement, rounded_mask
from paramlens.method.settings import Init
from paramlens.method.sites import at_rest
from paramlens.method.start import initialise
from paramlens.method.threshold import ACTIVE
from paramlens.runs.rundir import Run

THRESHOLDS = (0.5, 0.3, 0.2, ACTIVE, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
"""Thresholds of the decomposition's curve: subcomponents with g above the threshold are on, all others off."""


@dataclass(frozen=True)
class Pruned:
    """A point of the greedy path: KL(target ‖ pruned) in nats, and the rank left at every site."""

    kl: float
    ranks: dict[str, int]
    total: int
    """Σ of `ranks`."""


@dataclass(frozen=True)
class ThresholdPoint:
    """A point of the decomposition's curve: the subcomponents with g > threshold, and the divergence with only these on."""

    threshold: float
    kl: float
    """KL(target ‖ masked) in nats; at every token, its own active subcomponents are fully on."""
    active: dict[str, float]
    """Site → mean number of active subcomponents at the role where this is largest."""
    unique: dict[str, int]
    """Site → number of subcomponents active at one evaluated position at least."""
    kl_static: float
    """KL in nats with the unique subcomponents fully on at every token, as in the pruned SVD."""


@dataclass(frozen=True, repr=False)
class SvdBaseline(Result):
    """Algorithm 2 on a run's target, at the tolerance and along its whole path, and the decomposition on the same sequences."""

    run: str
    step: int
    sequences: int
    tolerance: float
    """Largest KL allowed, in nats; by default the decomposition's own recon."""
    kl: float
    """KL(target ‖ pruned) in nats where the pruning stopped."""
    ranks: dict[str, int]
    """Site → rank left there."""
    curve: list[Pruned]
    """From full rank to 0. The KL may fall at some steps; the pruning stops before the first step that exceeds the tolerance."""
    recon: float
    """KL(target ‖ masked) in nats of the decomposition, masks g."""
    decomposition: list[ThresholdPoint]
    """At each of `THRESHOLDS`."""
    factor_active: float | None
    """Rank that SVD keeps, divided by the `active` subcomponents (g > 0.1), both summed over sites. None: none is active."""
    factor_unique: float | None
    """Rank that SVD keeps, divided by the unique subcomponents, both summed over sites. None: there are none."""

    def rank_at(self, tolerance: float) -> int:
        """Total rank left, summed over sites, if the pruning stops at `tolerance` nats."""
        return pruned_to(self.curve, tolerance).total

    @property
    def counted(self) -> ThresholdPoint:
        """The decomposition at Table 1's threshold."""
        return next(point for point in self.decomposition if point.threshold == ACTIVE)

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> str:
        ranks, unique = sum(self.ranks.values()), sum(self.counted.unique.values())
        return f"{self.run}, step {self.step}: rank {ranks} at KL {self.kl:.2e} nats, {unique} subcomponents at {self.recon:.2e}"

    def tables(self) -> tuple[Table, ...]:
        """The ranks at the tolerance and the decomposition's counts, site by site; then both curves at a few points."""
        ours = self.counted
        sums = row("sum", str(sum(self.ranks.values())), f"{sum(ours.active.values()):.3f}", str(sum(ours.unique.values())), tone="strong")
        factors = [(name, factor) for name, factor in (("active", self.factor_active), ("unique", self.factor_unique)) if factor]
        more = "SVD keeps " + ", ".join(f"{factor:.1f} times as many as are {name}" for name, factor in factors)
        ranks = Table(
            f"SVD pruned to KL {self.kl:.2e} (tolerance {self.tolerance:.2e}) nats beside the decomposition's {self.recon:.2e}",
            columns("site", "SVD rank", "active at its role", "unique"),
            (
                *(
                    (site_cell(site), *row(str(rank), f"{ours.active[site]:.3f}", str(ours.unique[site])))
                    for site, rank in self.ranks.items()
                ),
                sums,
            ),
            notes=(Cell(more),) if factors else (),
        )
        heads = tuple(Column(name) for name in ("KL up to, nats", "SVD", "active", "unique"))
        points = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
        curve = Table("Rank-1 matrices in all, and the KL with them alone", heads, tuple(self._at(point) for point in points))
        return ranks, curve

    def _at(self, tolerance: float) -> tuple[Cell, ...]:
        held = [point for point in self.decomposition if point.kl <= tolerance]
        fewest = min(held, key=lambda point: sum(point.active.values()), default=None)
        ours = (f"{sum(fewest.active.values()):.1f}", str(sum(fewest.unique.values()))) if fewest else ("-", "-")
        return row(f"{tolerance:.0e}", str(self.rank_at(tolerance)), *ours)

    def charts(self) -> tuple[Chart, ...]:
        """Figure 2: KL against rank or number of subcomponents."""
        lines = (
            Line("SVD, rank left", tuple((float(point.total), point.kl) for point in self.curve)),
            Line("active at their role", tuple((sum(point.active.values()), point.kl) for point in self.decomposition)),
            Line("unique, the active ones on", tuple((float(sum(point.unique.values())), point.kl) for point in self.decomposition)),
        )
        return (Chart("KL with so many rank-1 matrices alone; dashed: the tolerance", "rank 1 parts", "KL, nats", lines, self.tolerance),)


def pruned_to(curve: Sequence[Pruned], tolerance: float) -> Pruned:
    """Where Algorithm 2 stops: the last point before the first one whose KL exceeds `tolerance`, or full rank if there is none before."""
    stop = next((i for i, point in enumerate(curve) if point.kl > tolerance), len(curve))
    return curve[max(0, stop - 1)]


@torch.no_grad()
def svd_baseline(run: Run, *, tolerance: float | None = None, batches: int = 16, at_once: int = 1) -> SvdBaseline:
    """Algorithm 2 on the target of `run`, compared with the decomposition's counts and divergence on the same held-out sequences.

    Every step tries, at each site with rank left, to remove the `at_once` smallest remaining singular values. It keeps the attempt with
    the lowest KL over all sites. The pruning stops before the first step whose KL exceeds the tolerance. The algorithm as printed stops
    inside its loop over sites, before all are compared, if the best attempt so far exceeds the tolerance.
    tolerance: in nats. Defaults to the decomposition's recon. The path continues to rank 0, so that `curve` answers every tolerance.
    Raises `ConfigError` for a negative tolerance, for `batches` or `at_once` below 1, and for a run opened without batches.
    """
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise ConfigError(f"tolerance {tolerance}: give nats, 0 or more")
    if at_once < 1:
        raise ConfigError(f"at_once {at_once}: give 1 or more singular values")
    decomposition = run.decomposition
    with at_rest(decomposition.model), machine(run.config):
        data = held_out(run, batches=batches)
        divergence = _Divergence(run, data)
        points = [_threshold_point(decomposition, data, divergence, threshold) for threshold in THRESHOLDS]
        [at_g] = divergence(decomposition, lambda held: [held.masked])
        curve = _Pruning(decomposition, divergence, at_once).path()
    tolerance = at_g if tolerance is None else tolerance
    reached = pruned_to(curve, tolerance)
    ours = next(point for point in points if point.threshold == ACTIVE)
    return SvdBaseline(
        run=str(run.path),
        step=run.step,
        sequences=sum(held.target.logits.shape[0] for held in data),
        tolerance=tolerance,
        kl=reached.kl,
        ranks=reached.ranks,
        curve=curve,
        recon=at_g,
        decomposition=points,
        factor_active=_ratio(reached.total, sum(ours.active.values())),
        factor_unique=_ratio(reached.total, float(sum(ours.unique.values()))),
    )


class _Divergence:
    """KL(target ‖ plan) in nats on held-out batches, mean over the positions of the loss."""

    def __init__(self, run: Run, data: Sequence[HeldOut]) -> None:
        self.data, self.last_token_only = data, run.config.last_token_only
        task = data_of(run)
        self.inputs = [task.loss_inputs(held.batch, last_token_only=self.last_token_only) for held in data]
        self.at = [LossAt(self.last_token_only, held.batch.present) for held in data]
        self.counts = [at.count(held.target.logits) for at, held in zip(self.at, data, strict=True)]
        self.log_probs = [at.log_probs(held.target.logits) for at, held in zip(self.at, data, strict=True)]

    def __call__(self, decomposition: Decomposition, plans: Callable[[HeldOut], Sequence[Plan]]) -> list[float]:
        """One number for each plan. plans: makes a list of plans from a batch; all lists have the same length."""
        runs = zip(self.data, self.inputs, self.at, self.log_probs, strict=True)
        each = [divergences(decomposition, inputs, plans(held), at=at, log_probs=log_probs) for held, inputs, at, log_probs in runs]
        return [mean_over_batches(values, self.counts) for values in zip(*each, strict=True)]


def _threshold_point(decomposition: Decomposition, data: Sequence[HeldOut], divergence: _Divergence, threshold: float) -> ThresholdPoint:
    roles = torch.cat([held.roles.flatten() for held in data])
    active: dict[str, float] = {}
    ever: dict[str, Tensor] = {}
    for site in decomposition.names:
        on = torch.cat([held.g[site].flatten(0, -2) > threshold for held in data])
        counts = on.sum(-1, dtype=torch.float64)
        active[site] = max(counts[roles == role].mean().item() for role in roles[roles >= 0].unique())
        ever[site] = on.any(0)

    def plans(held: HeldOut) -> list[Plan]:
        return [
            {site: Replacement(rounded_mask(value, threshold=threshold)) for site, value in held.g.items()},
            {site: Replacement(ever[site].to(value.dtype).expand_as(value)) for site, value in held.g.items()},
        ]

    kl, kl_static = divergence(decomposition, plans)
    return ThresholdPoint(threshold, kl, active, {site: int(on.sum()) for site, on in ever.items()}, kl_static)


class _Pruning:
    """The greedy path. The SVD is a decomposition whose subcomponents are the singular pairs in order, so a rank is a mask."""

    def __init__(self, decomposition: Decomposition, divergence: _Divergence, at_once: int) -> None:
        sites = decomposition.sites
        self.ranks = {site.name: min(site.W.shape) for site in sites}
        self.svd = Decomposition(decomposition.model, sites, C=max(self.ranks.values()), dtype=sites[0].W.dtype)
        initialise(self.svd, Init(kind="svd"), generator=generator("svd"))
        self.divergence, self.at_once = divergence, at_once

    def path(self) -> list[Pruned]:
        """All points from full rank to rank 0 at every site."""
        points = [self._point(self._divergences([self.ranks])[0])]
        while any(self.ranks.values()):
            attempts = [self.ranks | {site: max(0, rank - self.at_once)} for site, rank in self.ranks.items() if rank]
            divergences = self._divergences(attempts)
            best = min(range(len(attempts)), key=divergences.__getitem__)
            self.ranks = attempts[best]
            points.append(self._point(divergences[best]))
        return points

    def _point(self, kl: float) -> Pruned:
        return Pruned(kl, dict(self.ranks), sum(self.ranks.values()))

    def _divergences(self, attempts: Sequence[Mapping[str, int]]) -> list[float]:
        return self.divergence(self.svd, lambda held: [self._plan(ranks, held) for ranks in attempts])

    def _plan(self, ranks: Mapping[str, int], held: HeldOut) -> Plan:
        kept = torch.arange(max(self.svd.C.values()), device=self.svd.device)
        return {site: Replacement((kept < ranks[site]).to(g.dtype).expand(*g.shape[:-1], -1)) for site, g in held.g.items()}


def _ratio(ranks: int, parts: float) -> float | None:
    return ranks / parts if parts else None
