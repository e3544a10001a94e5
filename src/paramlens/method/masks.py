"""Masks r from importances g, random subsets of sites, and the masked product (Algorithm 3, lines 4 and 5; eqs. 2 and 5 to 8)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from paramlens.errors import BatchError
from paramlens.kernels import native
from paramlens.method.generators import generator


@dataclass(frozen=True)
class Replacement:
    """A site's mask in one plan: r = g, or, with a key, r = g + (1 - g) u in [g, 1], with noise u from that key.

    where: (batch, pos or 1), true where the mask applies; elsewhere the target's weight is used. Defaults to None: everywhere.
    sink: contiguous, shaped as g; the compiled product adds g's gradient to it. Defaults to None: autograd sums one tensor per plan.
    remainder: m_Δ (batch, pos), in [0, 1], the mask of the remainder Δ = W - U V. Defaults to None: 0, so that Δ is left out.
    """

    g: Float[Tensor, "*batch C"]
    key: int | None = None
    where: Bool[Tensor, "*#batch"] | None = None
    sink: Float[Tensor, "*batch C"] | None = None
    remainder: Float[Tensor, "*batch"] | None = None


def rounded_mask(g: Float[Tensor, "*batch C"], *, threshold: float) -> Float[Tensor, "*batch C"]:
    """1 where g > threshold, else 0: the subcomponents that Table 1 counts are fully on, all others off."""
    return (g > threshold).to(g.dtype)


def site_subsets(
    count: int,
    shape: tuple[int, ...],
    generator: torch.Generator,
) -> Bool[Tensor, "site *shape"]:
    """Random subsets M of `count` sites (eq. 5): size k ~ U{1..count}, then k sites at random, independently for each cell of `shape`."""
    k: Int[Tensor, "*shape"] = torch.randint(1, count + 1, shape, generator=generator, device=generator.device)
    order = torch.rand(count, *shape, generator=generator, device=generator.device).argsort(dim=0).argsort(dim=0)
    return order < k


def subset_shape(scope: Literal["forward", "sequence", "position"], batch: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of independent draws of M: one, one per sequence, or one per position; it broadcasts over `batch`."""
    return {"forward": (), "sequence": (batch[0], *(1 for _ in batch[1:])), "position": batch}[scope]


def stochastic_mask(g: Float[Tensor, "*batch C"], noise: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
    """Mask r = g + (1 - g) u, in [g, 1]; the gradient with respect to g is 1 - u (Algorithm 3, line 4)."""
    return torch.lerp(g, torch.ones_like(g), noise)


_noise_source: ContextVar[torch.Generator | None] = ContextVar("noise_source", default=None)


@contextmanager
def noise_from(rng: torch.Generator) -> Iterator[None]:
    """While active, masks draw from `rng` instead of their keys: in a captured step the keys are fixed."""
    before = _noise_source.set(rng)
    try:
        yield
    finally:
        _noise_source.reset(before)


def remainder_noise(key: int, g: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch"]:
    """Masks m_Δ ~ U(0, 1) of the remainder, one per position, from the noise of `key`."""
    return mask_noise(key, g.detach()[..., :1])[..., 0]


def mask_noise(key: int, like: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
    """Noise u ~ U(0, 1): a pure function of key, shape and kind of device. Inside `noise_from`, it comes from its generator."""
    if (given := _noise_source.get()) is not None:
        return torch.rand(like.shape, generator=given, device=like.device, dtype=like.dtype)
    if native.serves(like):
        noise = torch.empty_like(like, memory_format=torch.contiguous_format)
        native.uniform(native.units(noise), noise, noise.numel(), key)
        return noise
    rng = generator("noise", key, device=like.device)
    return torch.rand(like.shape, generator=rng, device=like.device, dtype=like.dtype)


def masked_linear(
    x: Float[Tensor, "*batch d_in"],
    U: Float[Tensor, "d_in C"],
    V: Float[Tensor, "C d_out"],
    replacements: Sequence[Replacement],
    bias: Float[Tensor, "d_out"] | None,
) -> Float[Tensor, "*batch d_out"]:
    """`((x @ U) * (r - m_Δ)) @ V + bias`, where r and m_Δ are those of `replacements` joined along the first axis.

    Where a replacement has no remainder, m_Δ is 0. With one, m_Δ x W is still to be added (`products`). Raises `BatchError` if masks and
    input disagree on the leading axes.
    """
    leading = (sum(replacement.g.shape[0] for replacement in replacements), *replacements[0].g.shape[1:-1])
    if leading != tuple(x.shape[:-1]):
        raise BatchError(
            f"mask has leading axes {leading}, the site's input {tuple(x.shape[:-1])}; compute the masks from the same batch as the input"
        )
    gs, keys = [replacement.g for replacement in replacements], [replacement.key for replacement in replacements]
    if native.serves(x, U, V, *gs) and _noise_source.get() is None:
        sinks = [replacement.sink for replacement in replacements]
        assert all(sink is None or sink.is_contiguous() for sink in sinks), "a sink is written to in rows of its own memory"
        remainders = [replacement.remainder for replacement in replacements]
        product = _MaskedProduct.apply(x, U, V, keys, sinks, *gs, *remainders)
        return product if bias is None else product + bias
    return F.linear((x @ U) * torch.cat(masks_of(replacements)), V.T, bias)


def masks_of(replacements: Sequence[Replacement]) -> list[Float[Tensor, "*batch C"]]:
    """The masks r - m_Δ of `replacements`."""
    masks = [each.g if each.key is None else stochastic_mask(each.g, mask_noise(each.key, each.g)) for each in replacements]
    return [r if each.remainder is None else r - each.remainder.unsqueeze(-1) for r, each in zip(masks, replacements, strict=True)]


class _MaskedProduct(torch.autograd.Function):
    """`((x @ U) * (r - m_Δ)) @ V` by chunks of rows that fit into the cache.

    The backward pass computes inner activations and masks again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        U: Tensor,
        V: Tensor,
        keys: Sequence[int | None],
        sinks: Sequence[Tensor | None],
        *gs_and_remainders: Tensor | None,
    ) -> Tensor:
        """The last arguments are g of every plan, then m_Δ of every plan or None."""
        rows = x.reshape(len(keys), -1, x.shape[-1])
        U, V = U.contiguous(), V.contiguous()
        masks = [None if each is None else each.contiguous() for each in gs_and_remainders]
        gs, remainders = cast("list[Tensor]", masks[: len(keys)]), masks[len(keys) :]
        ctx.save_for_backward(rows, U, V, *masks)
        ctx.keys, ctx.sinks = keys, sinks
        out = x.new_empty(*rows.shape[:2], V.shape[1])
        size = _chunk_rows(rows, U)
        inner = x.new_empty(size, U.shape[1])
        plans = [[each.split(size) for each in (x, g.flatten(0, -2), y)] for x, g, y in zip(rows, gs, out, strict=True)]
        shifts = _split(remainders, size)
        for i in range(len(plans[0][0])):
            for (reads, g, y), key, shift in zip(plans, keys, shifts, strict=True):
                part = inner[: len(reads[i])]
                torch.mm(reads[i], U, out=part)
                shifted = None if shift is None else part * shift[i]
                native.mask_forward(native.units(part), part, g[i], part.numel(), *_noise(key, i * inner.numel()))
                if shifted is not None:
                    part -= shifted
                torch.mm(part, V, out=y[i])
        return out.view(-1, *gs[0].shape[1:-1], V.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, U, V, *masks = ctx.saved_tensors
        gs, remainders = cast("list[Tensor]", masks[: len(ctx.keys)]), masks[len(ctx.keys) :]
        above = grad.reshape(len(gs), -1, grad.shape[-1])
        wanted = ctx.needs_input_grad[0]
        grad_rows = torch.empty_like(rows if wanted else rows[:, :0])
        grad_U, grad_V = torch.zeros_like(U), torch.zeros_like(V)
        grad_gs = {id(g): torch.zeros_like(g) for g, sink in zip(gs, ctx.sinks, strict=True) if sink is None}  # plans with one g share it
        to_gs = [grad_gs[id(g)] if sink is None else sink for g, sink in zip(gs, ctx.sinks, strict=True)]
        size = _chunk_rows(rows, U)
        inner, below = rows.new_empty(2, size, U.shape[1])
        plans = [
            [each.split(size) for each in (x, a, g.flatten(0, -2), to_g.flatten(0, -2), to_x)]
            for x, a, g, to_g, to_x in zip(rows, above, gs, to_gs, grad_rows, strict=True)
        ]
        shifts = _split(remainders, size)
        grad_remainders = [None if each is None else torch.empty_like(each) for each in remainders]
        to_shifts = _split(grad_remainders, size)
        for i in range(len(plans[0][0])):
            for (x, a, g, to_g, to_x), key, shift, to_shift in zip(plans, ctx.keys, shifts, to_shifts, strict=True):
                part, grad_part = inner[: len(x[i])], below[: len(x[i])]
                torch.mm(x[i], U, out=part)
                torch.mm(a[i], V.T, out=grad_part)
                shifted = None
                if shift is not None and to_shift is not None:
                    to_shift[i].copy_((part * grad_part).sum(1, keepdim=True)).neg_()
                    shifted = part * shift[i], grad_part * shift[i]
                native.mask_backward(native.units(part), part, grad_part, g[i], to_g[i], part.numel(), *_noise(key, i * inner.numel()))
                if shifted is not None:
                    part -= shifted[0]
                    grad_part -= shifted[1]
                grad_V.addmm_(part.T, a[i])
                grad_U.addmm_(x[i].T, grad_part)
                if wanted:
                    torch.mm(grad_part, U.T, out=to_x[i])
        given = [grad_gs.pop(id(g), None) for g in gs]
        return grad_rows.view(*grad.shape[:-1], -1) if wanted else None, grad_U, grad_V, None, None, *given, *grad_remainders


def _split(remainders: Sequence[Tensor | None], size: int) -> list[tuple[Tensor, ...] | None]:
    """m_Δ of every plan as columns of `size` rows each."""
    return [None if each is None else each.view(-1, 1).split(size) for each in remainders]


def _noise(key: int | None, place: int) -> tuple[int, int, int]:
    """The last arguments of a mask kernel: whether there is noise, its key, and the index of its first number."""
    return (0, 0, 0) if key is None else (1, key, place)


def _chunk_rows(rows: Float[Tensor, "plan row d_in"], U: Float[Tensor, "d_in C"]) -> int:
    """Number of rows in a chunk: inner activations, g and their gradients fit into half of the threads' caches, if these are not small."""
    return min(max(16, native.chunk_rows(U.shape[1], tensors=8)), rows.shape[1])
