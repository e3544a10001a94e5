"""The number and the first values of U and V's subcomponents, and projections that keep U V = W (eq. 1 as a constraint)."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.method.decomposition import Decomposition
from paramlens.method.settings import Init
from paramlens.method.sites import Site

GENEROUS = 2
"""Subcomponents at the start of a run with `C: auto`, as a multiple of the rank that the largest weight can have."""


def subcomponents(C: int | Literal["auto"], sites: Sequence[Site]) -> int:
    """The number of subcomponents of every site at the first step."""
    return GENEROUS * max(min(site.d_in, site.d_out) for site in sites) if C == "auto" else C


def out_of_reach(decomposition: Decomposition) -> str | None:
    """A text for the user if C is below the rank that a weight can have and Δ is no component, so that U V cannot be W. None: it can."""
    wide = {} if decomposition.delta else {site.name: min(site.d_in, site.d_out) for site in decomposition.sites}
    lacking = [name for name, rank in wide.items() if decomposition.C[name] < rank]
    if not lacking:
        return None
    most = max(lacking, key=lambda name: wide[name])
    others = f" and {len(lacking) - 1} more sites" if len(lacking) > 1 else ""
    return (
        f"C {decomposition.C[most]} is below the rank {wide[most]} that the weight at {most}{others} can have: U V will miss a part of it. "
        f"Give delta true, which makes that part a component, or C {max(wide.values())}"
    )


@torch.no_grad()
def initialise(decomposition: Decomposition, init: Init, *, generator: torch.Generator) -> None:
    """Set U and V to their first values, by `init.kind`.

    random: independent normal entries, scaled so that U V has W's Frobenius norm in expectation.
    svd: W's singular pairs, with √(singular value) in U and in V; the other subcomponents read random directions and write nothing.
    svd_rotated: U = A R, V = Rᵀ B for the SVD factors W = A B and a random R with orthonormal rows, so that U V = W and no
    subcomponent is special.
    """
    for site, U, V in zip(decomposition.sites, decomposition._U, decomposition._V, strict=True):
        W = site.W.to(torch.float64).cpu()
        C, rank = U.shape[1], min(*W.shape, U.shape[1])
        if init.kind == "random":
            reads = torch.randn(U.shape, generator=generator, dtype=torch.float64)
            writes = torch.randn(V.shape, generator=generator, dtype=torch.float64)
            scale = (W.norm() / (C * W.numel()) ** 0.5) ** 0.5
            reads, writes = reads * scale, writes * scale
        else:
            left, singular, right = torch.linalg.svd(W, full_matrices=False)
            A, B = left[:, :rank] * singular[:rank].sqrt(), singular[:rank, None].sqrt() * right[:rank]
            if init.kind == "svd":
                spare = torch.randn(site.d_in, C - rank, generator=generator, dtype=torch.float64)
                spare *= A.norm() / (site.d_in * rank) ** 0.5
                reads, writes = torch.cat([A, spare], dim=1), torch.cat([B, B.new_zeros(C - rank, site.d_out)])
            else:
                R = torch.linalg.qr(torch.randn(C, rank, generator=generator, dtype=torch.float64)).Q.T
                reads, writes = A @ R, R.T @ B
        U.copy_(reads)
        V.copy_(writes)


@torch.no_grad()
def project(decomposition: Decomposition) -> None:
    """Move U and V to the pair with U V = W that is nearest to first order: one Newton step on eq. 1, in float64.

    The error E = W - U V becomes dU dV, which is of order E². A part of E that no first-order change of U and V can remove stays.
    """
    for sites, Us, Vs in _same_shaped(decomposition):
        U, V = torch.stack(Us).to(torch.float64), torch.stack(Vs).to(torch.float64)
        W = torch.stack([site.W for site in sites]).to(torch.float64)
        _add(_smallest_change(U, V, W - U @ V), Us, Vs)


@torch.no_grad()
def project_gradients(decomposition: Decomposition) -> None:
    """Remove from the gradients of U and V what changes U V to first order; otherwise it would dominate the optimizer's moments."""
    for _, Us, Vs in _same_shaped(decomposition):
        U, V = torch.stack(Us).to(torch.float64), torch.stack(Vs).to(torch.float64)
        to_U, to_V = ([torch.zeros_like(each) if each.grad is None else each.grad for each in side] for side in (Us, Vs))
        E = torch.stack(to_U).to(torch.float64) @ V + U @ torch.stack(to_V).to(torch.float64)
        _add(_smallest_change(U, V, -E), to_U, to_V)


def _same_shaped(decomposition: Decomposition) -> Iterator[tuple[list[Site], list[Tensor], list[Tensor]]]:
    """Groups of sites of the same shape, with their U and V."""
    groups: dict[tuple[int, int], list[tuple[Site, Tensor, Tensor]]] = {}
    for site, U, V in zip(decomposition.sites, decomposition._U, decomposition._V, strict=True):
        groups.setdefault((site.d_in, site.d_out), []).append((site, U, V))
    for members in groups.values():
        sites, Us, Vs = (list(each) for each in zip(*members, strict=True))
        yield sites, Us, Vs


def _smallest_change(
    U: Float[Tensor, "site d_in C"], V: Float[Tensor, "site C d_out"], E: Float[Tensor, "site d_in d_out"]
) -> tuple[Float[Tensor, "site d_in C"], Float[Tensor, "site C d_out"]]:
    """The smallest (dU, dV) with dU V + U dV = E: dU = L Vᵀ and dV = Uᵀ L, where U Uᵀ L + L Vᵀ V = E; float64."""
    (a, P), (b, Q) = torch.linalg.eigh(U @ U.mT), torch.linalg.eigh(V.mT @ V)
    scale = a[:, :, None] + b[:, None, :]
    reached = scale > scale.amax((1, 2), keepdim=True) * torch.finfo(torch.float64).eps * max(E.shape[1:])
    L = P @ torch.where(reached, P.mT @ E @ Q / scale, 0) @ Q.mT
    return L @ V.mT, U.mT @ L


def _add(changes: tuple[Tensor, Tensor], Us: Sequence[Tensor], Vs: Sequence[Tensor]) -> None:
    for change, values in zip(changes, (Us, Vs), strict=True):
        for each, value in zip(change, values, strict=True):
            value.add_(each)
