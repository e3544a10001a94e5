"""The MLPs inside γ, one per subcomponent: their results at every row and all gradients, without storing the hidden units."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from paramlens.kernels import native
from paramlens.kernels.machine import fusible

MIN_CHUNK = 128
"""Minimum number of rows in a chunk: with fewer, each chunk reads all of γ's weights for little work."""

WHOLE = 64
"""Rows in a chunk of hidden units are a multiple of this: numbers beyond the last whole vector are computed one by one."""

GPU_CHUNK = 2**28
"""Number of γ's hidden units computed at once on a GPU: 1 GiB in fp32."""


class Mlps(torch.autograd.Function):
    """One MLP per subcomponent, all on the same rows, computed by chunks of rows without storing all hidden units.

    A chunk's hidden units stay in the cache, and the backward pass computes them again. This saves memory traffic, not arithmetic:
    the whole hidden tensor (site, row, C * d_gate) would be written and read many times.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Float[Tensor, "site row width"],
        w_in: Float[Tensor, "site C width d_gate"],
        b_in: Float[Tensor, "site C d_gate"],
        w_out: Float[Tensor, "site C d_gate"],
        b_out: Float[Tensor, "site C"],
    ) -> Float[Tensor, "site row C"]:
        b_in, w_out, b_out = b_in.contiguous(), w_out.contiguous(), b_out.contiguous()
        ctx.save_for_backward(rows, w_in, b_in, w_out)
        if native.serves(rows, w_in, b_in, w_out, b_out):
            return _native_forward(rows, w_in, b_in, w_out, b_out)
        flat_w, flat_b = w_in.permute(0, 2, 1, 3).flatten(2), b_in.flatten(1)[:, None]
        pre = rows.new_empty(*rows.shape[:2], w_out.shape[1])
        for part in _chunks(rows, w_in):
            pre[:, part] = _mixed(torch.bmm(rows[:, part], flat_w), flat_b, w_out, b_out)
        return pre

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "site row C"]) -> tuple[Tensor | None, ...]:
        rows, w_in, b_in, w_out = ctx.saved_tensors
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        if native.serves(rows, w_in, b_in, w_out, grad):
            return _native_backward(rows, w_in, b_in, w_out, grad, grad_rows)
        flat_w, flat_b = w_in.permute(0, 2, 1, 3).flatten(2), b_in.flatten(1)[:, None]
        grad_w_in, grad_b_in, grad_w_out = torch.zeros_like(flat_w), torch.zeros_like(flat_b), torch.zeros_like(w_out)
        for part in _chunks(rows, w_in):
            read = rows[:, part]
            below, to_w_out, to_b_in = _mixed_backward(torch.bmm(read, flat_w), flat_b, w_out, grad[:, part])
            grad_w_out += to_w_out
            grad_b_in += to_b_in
            grad_w_in.baddbmm_(read.mT, below)
            if grad_rows is not None:
                grad_rows[:, part] = below @ flat_w.mT
        by_subcomponent = grad_w_in.unflatten(-1, w_out.shape[1:]).permute(0, 2, 1, 3)
        return grad_rows, by_subcomponent, grad_b_in.view_as(b_in), grad_w_out, grad.sum(1)


@fusible
def _mixed(before: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    """The MLPs' results (site, row, C) from their hidden products (site, row, C * d_gate)."""
    hidden = F.gelu(before + b_in).unflatten(-1, w_out.shape[1:])
    return (hidden * w_out[:, None]).sum(-1) + b_out[:, None]


@fusible
def _mixed_backward(before: Tensor, b_in: Tensor, w_out: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_mixed` with respect to the hidden products, w_out and b_in; the last has an axis of size 1 for rows."""
    before, above = before + b_in, grad[..., None]
    to_w_out = (F.gelu(before).unflatten(-1, w_out.shape[1:]) * above).sum(1)
    below = torch.ops.aten.gelu_backward((above * w_out[:, None]).flatten(2), before)
    return below, to_w_out, below.sum(1, keepdim=True)


def _native_forward(rows: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    C, h = w_out.shape[1:]
    pre = rows.new_empty(*rows.shape[:2], C)
    size, memory = _hidden_memory(rows, C * h)
    for x_all, w, b, v, c, out_all in zip(rows, w_in.mT.flatten(1, 2), b_in, w_out, b_out, pre, strict=True):
        for x, out in zip(x_all.split(size), out_all.split(size), strict=True):
            hidden = memory[: len(x) * C * h].view(C * h, len(x))
            torch.mm(w, x.T, out=hidden)
            native.mlps_forward(C, hidden, b, v, c, out, len(x), C, h)
    return pre


def _native_backward(
    rows: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, grad: Tensor, grad_rows: Tensor | None
) -> tuple[Tensor | None, ...]:
    C, h = w_out.shape[1:]
    flat_w, grad = w_in.mT.flatten(1, 2), grad.contiguous()
    grad_w_in, grad_b_in, grad_w_out = torch.zeros_like(flat_w), torch.zeros_like(b_in), torch.zeros_like(w_out)
    grad_b_out = b_in.new_zeros(len(rows), C)
    size, memory = _hidden_memory(rows, C * h)
    for s, (w, b, v) in enumerate(zip(flat_w, b_in, w_out, strict=True)):
        to_w, sums = grad_w_in[s], (grad_b_in[s], grad_w_out[s], grad_b_out[s])
        parts = rows[s].split(size)
        to_rows = [None] * len(parts) if grad_rows is None else grad_rows[s].split(size)
        for x, above, to_x in zip(parts, grad[s].split(size), to_rows, strict=True):
            hidden = memory[: len(x) * C * h].view(C * h, len(x))
            torch.mm(w, x.T, out=hidden)
            native.mlps_backward(C, hidden, b, v, above, *sums, len(x), C, h)
            to_w.addmm_(hidden, x)
            if to_x is not None:
                torch.mm(hidden.T, w, out=to_x)
    return grad_rows, grad_w_in.unflatten(1, (C, h)).mT, grad_b_in, grad_w_out, grad_b_out


def _hidden_memory(rows: Tensor, hidden: int) -> tuple[int, Tensor]:
    """Number of rows in a chunk, such that its hidden units fit into the threads' caches, and memory for these hidden units."""
    size = min(max(MIN_CHUNK, native.cached_numbers() // hidden // WHOLE * WHOLE), rows.shape[1])
    return size, rows.new_empty(hidden * size)


class ScalarMlps(torch.autograd.Function):
    """One MLP per subcomponent, each on its own number, without storing all hidden units, as in `Mlps`."""

    @staticmethod
    def forward(
        ctx: Any,
        inner: Float[Tensor, "site row C"],
        w_in: Float[Tensor, "site C d_gate"],
        b_in: Float[Tensor, "site C d_gate"],
        w_out: Float[Tensor, "site C d_gate"],
        b_out: Float[Tensor, "site C"],
    ) -> Float[Tensor, "site row C"]:
        inner, w_in, b_in, w_out, b_out = (each.contiguous() for each in (inner, w_in, b_in, w_out, b_out))
        ctx.save_for_backward(inner, w_in, b_in, w_out)
        pre = torch.empty_like(inner)
        if native.serves(inner, w_in, b_in, w_out, b_out):
            for s, x, out in _site_chunks(inner, pre):
                native.scalar_mlps_forward(x.shape[1], x, w_in[s], b_in[s], w_out[s], b_out[s], out, *x.shape, w_in.shape[-1])
            return pre
        for part in _chunks(inner, w_in):
            hidden = F.gelu(torch.addcmul(b_in[:, None], inner[:, part, :, None], w_in[:, None]))
            pre[:, part] = hidden.mul_(w_out[:, None]).sum(-1).add_(b_out[:, None])
        return pre

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "site row C"]) -> tuple[Tensor, ...]:
        inner, w_in, b_in, w_out = cast("tuple[Tensor, ...]", ctx.saved_tensors)
        grad, grad_inner = grad.contiguous(), torch.empty_like(inner)
        grad_w_in, grad_b_in, grad_w_out = torch.zeros_like(w_in), torch.zeros_like(b_in), torch.zeros_like(w_out)
        grad_b_out = b_in.new_zeros(b_in.shape[:2])
        if native.serves(inner, w_in, b_in, w_out, grad):
            for s, x, above, to_x in _site_chunks(inner, grad, grad_inner):
                sums = (grad_w_in[s], grad_b_in[s], grad_w_out[s], grad_b_out[s])
                native.scalar_mlps_backward(x.shape[1], x, w_in[s], b_in[s], w_out[s], above, to_x, *sums, *x.shape, w_in.shape[-1])
            return grad_inner, grad_w_in, grad_b_in, grad_w_out, grad_b_out
        for part in _chunks(inner, w_in):
            x, above = inner[:, part, :, None], grad[:, part, :, None]
            before = torch.addcmul(b_in[:, None], x, w_in[:, None])
            grad_w_out += F.gelu(before).mul_(above).sum(1)
            below = torch.ops.aten.gelu_backward(above * w_out[:, None], before)
            grad_w_in += (below * x).sum(1)
            grad_b_in += below.sum(1)
            grad_inner[:, part] = (below * w_in[:, None]).sum(-1)
            grad_b_out += above[..., 0].sum(1)
        return grad_inner, grad_w_in, grad_b_in, grad_w_out, grad_b_out


def _site_chunks(*tensors: Float[Tensor, "site row C"]) -> Iterator[tuple[Any, ...]]:
    """For every site and chunk of rows: the site's index, and each tensor's part."""
    size = native.chunk_rows(tensors[0].shape[-1], tensors=2 * len(tensors))
    for s, of_site in enumerate(zip(*tensors, strict=True)):
        yield from ((s, *parts) for parts in zip(*(each.split(size) for each in of_site), strict=True))


def _chunks(rows: Float[Tensor, "site row _"], w_in: Float[Tensor, "site C *_ d_gate"]) -> Iterator[slice]:
    """Chunks of rows whose hidden units, of all sites, fit into a CPU's cache or are at most GPU_CHUNK on a GPU."""
    elements = native.cached_numbers() if rows.device.type == "cpu" else GPU_CHUNK
    size = max(MIN_CHUNK, elements // (len(w_in) * w_in.shape[1] * w_in.shape[-1]))
    return (slice(start, min(start + size, rows.shape[1])) for start in range(0, rows.shape[1], size))
