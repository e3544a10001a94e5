"""The core: every site's weight as a sum of rank-1 subcomponents, and runs of the target with sites replaced by them.

    W ≈ U @ V = Σ_c outer(U[:, c], V[c])                                      (eq. 1; U reads, V writes)
    masked run at a site:  y = ((x @ U) * r) @ V + bias

| tensor            | shape             | range                |
|-------------------|-------------------|----------------------|
| W                 | [d_in, d_out]     |                      |
| U                 | [d_in, C]         |                      |
| V                 | [C, d_out]        |                      |
| x, a site's input | [batch, pos, d_in]|                      |
| inner activation  | [batch, pos, C]   |                      |
| mask r            | [batch, pos, C]   | [0, 1]               |
| logits            | [batch, pos, token] |                    |
| stacked logits    | [plan, batch, pos, token] |              |

A plan says which sites are replaced, and by which mask. Plans are stacked along the batch: one forward pass runs them all,
and each site computes only what each plan needs of it, its own product or the masked one. A site that is given only the last
positions of the sequence, because the loss needs no others, takes the mask's last positions.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from paramlens.config import Init
from paramlens.errors import BatchError, SiteError
from paramlens.sites import Site, swapped_in
from paramlens.tasks import Inputs, map_tensors


@dataclass(frozen=True)
class Replacement:
    """A site's masked weight in one plan: mask r, and optionally where (batch, pos or 1) it stands in; elsewhere the target's own."""

    mask: Float[Tensor, "*batch C"]
    where: Bool[Tensor, "*#batch"] | None = None


Plan = Mapping[str, Replacement]
"""Site name → replacement; sites left out run the target's own weight."""


@dataclass(frozen=True)
class TargetRun:
    """One run of the target: its logits [batch, pos, token] and each site's input [batch, pos, d_in], both without gradient."""

    logits: Tensor
    inputs: dict[str, Tensor]


class Decomposition(nn.Module):
    """U and V of every site, and masked runs of the target `model`, which is never changed and never a submodule."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], *, C: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._target = (model,)  # in a tuple: the target's parameters are not the decomposition's
        self.sites = tuple(sites)
        self.C = C
        device = self.sites[0].W.device
        self._U = nn.ParameterList(torch.zeros(site.d_in, C, dtype=dtype, device=device) for site in sites)
        self._V = nn.ParameterList(torch.zeros(C, site.d_out, dtype=dtype, device=device) for site in sites)

    @property
    def model(self) -> nn.Module:
        return self._target[0]

    @property
    def device(self) -> torch.device:
        return self._U[0].device

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.sites)

    @property
    def U(self) -> dict[str, Float[Tensor, "d_in C"]]:
        """Site name → read directions."""
        return dict(zip(self.names, self._U, strict=True))

    @property
    def V(self) -> dict[str, Float[Tensor, "C d_out"]]:
        """Site name → write directions."""
        return dict(zip(self.names, self._V, strict=True))

    def target_run(self, inputs: Inputs) -> TargetRun:
        """The target as it is: logits bit-equal to calling it, and what every site was given."""
        seen: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}
        hooks = [site.module.register_forward_pre_hook(partial(_keep_input, seen[site.name], site.name)) for site in self.sites]
        try:
            with torch.no_grad():
                logits = call(self.model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        for name, calls in seen.items():
            if len(calls) != 1:
                raise SiteError(f"site {name}: the model calls it {len(calls)} times per run; a site must be called exactly once")
        return TargetRun(logits, {name: calls[0] for name, calls in seen.items()})

    def masked_run(self, inputs: Inputs, plans: Sequence[Plan]) -> Float[Tensor, "plan batch *pos token"]:
        """Logits of every plan from one forward pass, plans stacked along the batch axis."""
        stacked = inputs if len(plans) == 1 else map_tensors(lambda t: t.repeat(len(plans), *[1] * (t.dim() - 1)), inputs)
        forwards = self._forwards(plans)
        calls: Counter[nn.Module] = Counter()
        hooks = [module.register_forward_pre_hook(partial(_count, calls)) for module in forwards]  # also keep fused fast paths off
        try:
            with swapped_in(forwards):
                logits = call(self.model, stacked)
        finally:
            for hook in hooks:
                hook.remove()
        for site in self.sites:
            if site.module in forwards and calls[site.module] != 1:
                raise SiteError(f"site {site.name}: called {calls[site.module]} times in a masked run; a site must be called exactly once")
        return logits.unflatten(0, (len(plans), -1))

    def _forwards(self, plans: Sequence[Plan]) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        for name in {name for plan in plans for name in plan} - set(self.names):
            raise SiteError(f"plan names {name}, which is no site of this decomposition; its sites: {', '.join(self.names)}")
        forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        for site, U, V in zip(self.sites, self._U, self._V, strict=True):
            replacements = [plan.get(site.name) for plan in plans]
            if any(replacement is not None for replacement in replacements):
                forwards[site.module] = _stacked_forward(site, U, V, replacements)
        return forwards


def _stacked_forward(site: Site, U: Tensor, V: Tensor, replacements: list[Replacement | None]) -> Callable[[Tensor], Tensor]:
    """What the site's module computes when `replacements` (one per plan, none: the target's weight) are stacked along its input."""
    original = site.module.forward

    def forward(x: Tensor) -> Tensor:
        parts, start = [], 0
        rows = x.shape[0] // len(replacements)
        for kind, run in groupby(replacements, key=_product):
            run = list(run)
            part = x[start : start + rows * len(run)]
            start += rows * len(run)
            if kind == "target":
                parts.append(original(part))
                continue
            masked = [replacement for replacement in run if replacement is not None]
            mask = torch.cat([_last_positions(replacement.mask, x) for replacement in masked])
            product = masked_linear(part, U, V, mask, site.bias)
            if kind == "scoped":
                where = [_last_positions(r.where.expand(r.mask.shape[:-1]), x) for r in masked if r.where is not None]
                product = torch.where(torch.cat(where)[..., None], product, original(part))
            parts.append(product)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return forward


def _product(replacement: Replacement | None) -> Literal["target", "masked", "scoped"]:
    if replacement is None:
        return "target"
    return "masked" if replacement.where is None else "scoped"


def _count(calls: "Counter[nn.Module]", module: nn.Module, _args: object) -> None:
    calls[module] += 1


def _keep_input(seen: list[Tensor], name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    if not args:
        raise SiteError(f"site {name}: the model calls it with keywords; a site must be given its input as the first argument")
    seen.append(args[0])


def _last_positions(values: Tensor, x: Tensor) -> Tensor:
    return values[:, -x.shape[1] :] if x.dim() == 3 and values.shape[1] > x.shape[1] else values


def masked_linear(
    x: Float[Tensor, "*batch d_in"],
    U: Float[Tensor, "d_in C"],
    V: Float[Tensor, "C d_out"],
    mask: Float[Tensor, "*mask_batch C"],
    bias: Float[Tensor, "d_out"] | None,
) -> Float[Tensor, "*batch d_out"]:
    """`((x @ U) * mask) @ V + bias`. Raises `BatchError` if mask and input disagree on the leading axes."""
    if mask.shape[:-1] != x.shape[:-1]:
        raise BatchError(
            f"mask has leading axes {tuple(mask.shape[:-1])}, the site's input {tuple(x.shape[:-1])}; masks come from the same batch"
        )
    return F.linear((x @ U) * mask, V.T, bias)


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's logits: its output, or the output's `.logits`."""
    if isinstance(inputs, Mapping):
        output: Any = model(**inputs)
    elif isinstance(inputs, tuple | list):
        output = model(*inputs)
    else:
        output = model(inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise BatchError(f"the model returned {type(output).__name__}; it must return logits or an output with .logits")
    return logits


@torch.no_grad()
def initialise(decomposition: Decomposition, init: Init, *, generator: torch.Generator) -> None:
    """Set U and V as `init.kind` says.

    random: independent normal entries, scaled so that U V has W's Frobenius norm in expectation.
    svd: W's singular pairs, the singular value split evenly; further subcomponents read at random and write nothing.
    svd_rotated: U = A R, V = Rᵀ B for the SVD factors W = A B and random R with orthonormal rows, so that U V = W and no
    subcomponent is favoured.
    """
    for site, U, V in zip(decomposition.sites, decomposition._U, decomposition._V, strict=True):
        W = site.W.to(torch.float64).cpu()
        C, rank = decomposition.C, min(W.shape[0], W.shape[1], decomposition.C)
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
