"""Controls of an edit: other edits at the same sites, made without the decomposition's choice, that remove as much as the edit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.analysis.components import run_sentences
from paramlens.analysis.edit import Edit, Method, Selected, taken_out, without_largest, without_random
from paramlens.method.generators import generator
from paramlens.runs.rundir import Run
from paramlens.tasks.facts.facts import Fact

DRAWS = 5
"""Number of draws of a random control; its figures are means over the draws."""

CONTROLS = ("random directions", "top singular directions", "random subcomponents", "activation read")

ROUNDING = torch.finfo(torch.float32).eps
"""Relative size below which a number is rounding error."""


@dataclass(frozen=True)
class Control:
    """New weights for the edited sites, one mapping per draw; no draws if `why_not` says why the control is impossible.

    slices: number of independent rank-1 slices that it removes, summed over sites.
    """

    draws: tuple[Mapping[str, Tensor], ...] = ()
    slices: int = 0
    why_not: str | None = None


class _NoControlError(Exception):
    """Its message says why the control is impossible."""


@dataclass(frozen=True)
class _Place:
    """An edited site. own: the subcomponents that the edit removes at the site; rest: all others; x: inputs of the site."""

    site: str
    W: Float[Tensor, "d_in d_out"]
    U: Float[Tensor, "d_in C"]
    V: Float[Tensor, "C d_out"]
    own: list[int]
    rest: list[int]
    x: Float[Tensor, "token d_in"]
    method: Method

    @property
    def slices(self) -> int:
        """Number of independent slices that the edit removes here."""
        return independent_slices(self.U[:, self.own], self.V[self.own], of=self.W)


def controls(run: Run, edit: Edit, fact: Fact, names: Sequence[str]) -> dict[str, Control]:
    """The controls `names`. Each removes as many slices at every edited site as the edit does, or says why it cannot.

    "activation read" instead removes one slice for each direction of the tokens' activations, with all that the weight writes for it.
    """
    places = _places(run, edit, fact)
    return {name: _control(name, places) for name in names}


def edit_slices(run: Run, edit: Edit) -> int:
    """Number of independent slices that an edit removes, summed over sites."""
    total = 0
    for site in run.decomposition.sites:
        own = [each.subcomponent for each in edit.selected if each.site == site.name]
        U, V = run.decomposition.U[site.name], run.decomposition.V[site.name]
        total += independent_slices(U[:, own], V[own], of=site.W)
    return total


def independent_slices(reads: Float[Tensor, "d_in r"], writes: Float[Tensor, "r d_out"], *, of: Float[Tensor, "d_in d_out"]) -> int:
    """How many of the r slices u vᵀ are linearly independent; a slice below `ROUNDING` times the norm of the weight `of` is not counted."""
    sizes = reads.double().norm(dim=0) * writes.double().norm(dim=1)
    kept = sizes > ROUNDING * of.double().norm()
    u, v = reads.double()[:, kept], writes.double()[kept]
    u, v = u / u.norm(dim=0), v / v.norm(dim=1, keepdim=True)
    return int(torch.linalg.matrix_rank((u.T @ u) * (v @ v.T), hermitian=True, rtol=1e-10)) if kept.any() else 0


def weight_rank(W: Float[Tensor, "row column"]) -> int:
    """Number of singular values of W above rounding error."""
    return int(torch.linalg.matrix_rank(W.double(), rtol=max(W.shape) * ROUNDING))


def without_activations(W: Float[Tensor, "d_in d_out"], x: Float[Tensor, "token d_in"]) -> Float[Tensor, "d_in d_out"]:
    """W ← W - X̂ᵀ X̂ W: the plain edit that removes all that the weight writes for the given activations (rows of x).

    The rows of X̂ are an orthonormal basis of the span of the activations, so equal activations count once.
    """
    basis = torch.linalg.svd(x.double(), full_matrices=False).Vh[: weight_rank(x)].T
    return (W.double() - basis @ (basis.T @ W.double())).to(W.dtype)


def _places(run: Run, edit: Edit, fact: Fact) -> list[_Place]:
    seen, places = run_sentences(run, [fact.sentence]), list[_Place]()
    for site in run.decomposition.sites:
        chosen = [each for each in edit.selected if each.site == site.name]
        if not chosen:
            continue
        own = [each.subcomponent for each in chosen]
        rest = [c for c in range(run.decomposition.C[site.name]) if c not in own]
        U, V, x = (
            run.decomposition.U[site.name],
            run.decomposition.V[site.name],
            site.vectors(_activations(seen.inputs[site.name][0], chosen)),
        )
        places.append(_Place(site.name, site.W, U, V, own, rest, x, edit.method))
    return places


def _control(name: str, places: Sequence[_Place]) -> Control:
    draws = [dict[str, Tensor]() for _ in range(DRAWS if "random" in name else 1)]
    slices = 0
    try:
        for place in places:
            taken = 0
            for draw, weights in enumerate(draws):
                weights[place.site], taken = _without(name, place, draw)
                if (place.W - weights[place.site]).norm() <= ROUNDING * place.W.norm():
                    raise _NoControlError(f"removes nothing at {place.site}")
            slices += taken
    except _NoControlError as reason:
        return Control(why_not=str(reason))
    return Control(tuple(draws), slices)


def _without(name: str, place: _Place, draw: int) -> tuple[Tensor, int]:
    """A control's weight at one site, and the number of slices it removes there. Raises `_NoControlError` if it is impossible."""
    W, count = place.W, len(place.own)
    if name == "random directions":
        return without_random(W, count, generator=generator("control", place.site, draw)), place.slices
    if name == "top singular directions":
        if (rank := weight_rank(W)) < count:
            raise _NoControlError(f"{place.site} has {rank} singular directions, and {count} subcomponents were removed")
        return without_largest(W, count), count
    if name == "activation read":
        return without_activations(W, place.x), weight_rank(place.x)
    sizes = place.U.norm(dim=0) * place.V.norm(dim=1)
    able = [c for c in place.rest if sizes[c] > ROUNDING * W.norm()]
    if len(able) < count:
        raise _NoControlError(f"{place.site} has {len(able)} other subcomponents that write anything, and {count} were removed")
    order = torch.randperm(len(able), generator=generator("control", "subcomponents", place.site, draw))
    drawn = [able[i] for i in order[:count].tolist()]
    reads, writes = place.U[:, drawn], place.V[drawn]
    if (taken := independent_slices(reads, writes, of=W)) < place.slices:
        raise _NoControlError(f"{taken} of those drawn at {place.site} are independent of each other, of those removed {place.slices}")
    return taken_out(W, reads, writes, place.method), taken


def _activations(x: Float[Tensor, "pos d_in"], chosen: Sequence[Selected]) -> Float[Tensor, "token d_in"]:
    """The site's inputs at the tokens of the chosen subcomponents; at all tokens if they were named by hand."""
    places = sorted({each.position for each in chosen if each.position is not None}) or range(len(x))
    return x[list(places)]
