"""Every subcomponent of a run that is active somewhere: what it reads and writes, where it is active, and the KL without it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from paramlens.analysis.components import Sentences, Subcomponent, described, shown_sequences
from paramlens.analysis.held_out import HeldOut, data_of, divergences, held_out
from paramlens.analysis.streams import Streams
from paramlens.display.result import Result
from paramlens.display.tables import Table, columns, row
from paramlens.kernels.machine import machine
from paramlens.method.decomposition import Plan
from paramlens.method.losses.divergence import LossAt
from paramlens.method.masks import Replacement
from paramlens.method.sites import at_rest
from paramlens.method.threshold import ACTIVE, require_threshold
from paramlens.runs.rundir import Run


@dataclass(frozen=True)
class Part:
    """A subcomponent and what it does. highest, mean: maximum and mean of g over all present positions.

    removed: KL(target ‖ target without it) in nats; all other subcomponents are on, and the other sites run the target's own weights.
    removed_masked: KL(target ‖ masked model without it), masks g. Both on the first evaluated batch, at the positions of the loss.
    """

    what: Subcomponent
    highest: float
    mean: float
    removed: float
    removed_masked: float


@dataclass(frozen=True)
class SiteParts:
    """Active subcomponents of a site, highest mean importance first; importance: Σ_c g at every shown token, [sequence][pos]."""

    importance: list[list[float]]
    parts: list[Part]


@dataclass(frozen=True, repr=False)
class Catalogue(Result):
    """All subcomponents of a run that are active (g > threshold) at one evaluated or shown position at least.

    tokens, roles: of every shown sequence, the same for all subcomponents. roles is None if positions have no roles.
    """

    run: str
    step: int
    threshold: float
    counts: dict[str, int]
    """Site → number of its subcomponents."""
    positions: int
    """Number of held-out positions evaluated."""
    masked: float
    """KL(target ‖ masked model) in nats on the first evaluated batch: the baseline of `removed_masked`."""
    tokens: list[list[str]]
    roles: list[list[str]] | None
    sites: dict[str, SiteParts]

    def to_json(self) -> dict[str, object]:
        """The JSON document. The shown sequences appear once, not in every subcomponent."""
        document = asdict(self)
        for site in document["sites"].values():
            for part in site["parts"]:
                what = part.pop("what")
                part |= {name: value for name, value in what.items() if name not in ("run", "site", "tokens")}
        return document

    def summary(self) -> str:
        active = sum(len(site.parts) for site in self.sites.values())
        return f"{self.run}, step {self.step}: {active} of {sum(self.counts.values())} subcomponents active somewhere"

    def tables(self) -> tuple[Table, ...]:
        """Every subcomponent with the KL without it, site by site."""
        names = columns("site", "subcomponent", "highest g", "mean g", "removed, nats", "from the masked model, nats")
        rows = (
            row(
                site,
                str(part.what.subcomponent),
                f"{part.highest:.3f}",
                f"{part.mean:.4f}",
                f"{part.removed:.2e}",
                f"{part.removed_masked:.2e}",
            )
            for site, each in self.sites.items()
            for part in each.parts
        )
        return (Table(f"Active subcomponents (importance > {self.threshold:g})", names, tuple(rows)),)


@torch.no_grad()
def catalogue(run: Run, *, threshold: float = ACTIVE, batches: int = 16) -> Catalogue:
    """Describe every active subcomponent of `run` on `batches` held-out batches. Raises `ConfigError` as `circuit` does."""
    require_threshold(threshold)
    decomposition, task = run.decomposition, data_of(run)
    with at_rest(task.model), machine(run.config):
        data = held_out(run, batches=batches)
        shown = shown_sequences(run)
        streams = Streams(run, shown.batch)
        removal = _Removal(run, data[0])
        sites: dict[str, SiteParts] = {}
        for site in decomposition.names:
            g = torch.cat([held.at_present(held.g[site]) for held in data])
            seen = torch.cat([g, *(shown.g[site][row, : len(words)] for row, words in enumerate(shown.texts))])
            highest, mean = seen.amax(0), g.mean(0)
            alive = (highest > threshold).nonzero()[:, 0]
            order = alive[mean[alive].argsort(descending=True, stable=True)].tolist()
            whole, masked = removal(site, order)
            rows = zip(described(run, site, order, shown, streams), order, whole, masked, strict=True)
            parts = [Part(what, highest[c].item(), mean[c].item(), *lost) for what, c, *lost in rows]
            sites[site] = SiteParts(_summed(shown, site), parts)
    return Catalogue(
        run=str(run.path),
        step=run.step,
        threshold=threshold,
        counts=decomposition.C,
        positions=sum(held.positions for held in data),
        masked=removal.masked,
        tokens=[list(words) for words in shown.texts],
        roles=None if shown.roles is None else [list(row) for row in shown.roles],
        sites=sites,
    )


def _summed(shown: Sentences, site: str) -> list[list[float]]:
    return [shown.g[site][row, : len(words)].sum(-1).tolist() for row, words in enumerate(shown.texts)]


class _Removal:
    """KL divergences without one subcomponent, on one batch."""

    def __init__(self, run: Run, held: HeldOut) -> None:
        self.decomposition, self.held = run.decomposition, held
        self.inputs = data_of(run).loss_inputs(held.batch, last_token_only=run.config.last_token_only)
        self.at = LossAt(run.config.last_token_only, held.batch.present)
        self.log_probs = self.at.log_probs(held.target.logits)
        [self.masked] = self._divergences([held.masked])

    def __call__(self, site: str, parts: Sequence[int]) -> tuple[list[float], list[float]]:
        """KL without each of `parts`: removed from the target, and removed from the masked model."""
        g = self.held.g[site]
        whole: list[Plan] = [{site: self.decomposition.without(_without(torch.ones_like(g), c))} for c in parts]
        masked: list[Plan] = [{**self.held.masked, site: Replacement(_without(g, c))} for c in parts]
        return self._divergences(whole), self._divergences(masked)

    def _divergences(self, plans: Sequence[Plan]) -> list[float]:
        found = divergences(self.decomposition, self.inputs, plans, at=self.at, log_probs=self.log_probs)
        return [max(0.0, value) for value in found]  # below 0 only by rounding


def _without(mask: Tensor, part: int) -> Tensor:
    mask = mask.clone()
    mask[..., part] = 0
    return mask
