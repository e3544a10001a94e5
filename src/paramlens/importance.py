"""Causal importance g = σ(γ(x)) in [0, 1]: for every token, how much of each subcomponent the output needs (§4.1, eq. 4).

γ maps what the *target* computes, never a masked run, to a pre-activation per subcomponent; the leaky-hard-sigmoid pair turns
that into g (`lower`) and into what minimality pushes on (`upper`). Sites of the same shape form a group whose networks are
computed together: parameters carry a leading `site` axis, and one batched product serves the group.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from paramlens import native
from paramlens.config import Gamma
from paramlens.errors import BatchError, ConfigError
from paramlens.machine import fusible

LEAK = 0.01
"""Slope of the leaky side of both sigmoids."""

MIN_CHUNK = 64
"""Fewest rows of a chunk: with fewer, each chunk reads all of γ's weights for next to no work."""

SCORES = 2**27
"""Attention scores of γ held at once, and kept for the gradient; beyond it, sequences go one by one."""

FLEX_LENGTH = 1024
"""Positions from which on γ's attention on CUDA runs as flex attention, which holds no (pos, pos) scores."""

GPU_CHUNK = 2**28
"""Hidden units of γ computed at once on a GPU: 1 GiB in fp32."""


class _Lower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor) -> Tensor:
        ctx.save_for_backward(pre)
        return pre.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (pre,) = ctx.saved_tensors
        if native.serves(pre, grad):
            below = torch.empty_like(pre, memory_format=torch.contiguous_format)
            native.lower_backward(native.units(pre), pre.contiguous(), grad.contiguous(), below, pre.numel())
            return below
        below = LEAK * grad.clamp(max=0)  # a descent step along a negative gradient raises pre
        return torch.where(pre <= 0, below, torch.where(pre <= 1, grad, 0))


def lower(pre: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Importance g: `clamp(pre, 0, 1)`.

    Gradient: 1 inside (0, 1], 0 above 1; at or below 0 it is 0.01 where descent would raise pre, and 0 otherwise. So below 0
    only reconstruction can revive a subcomponent.
    """
    return _Lower.apply(pre)


def upper(pre: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """What minimality sees: `1 + 0.01 (pre - 1)` above 1, `clamp(pre, 0, 1)` elsewhere; gradient 0 at or below 0.

    So above 1 only minimality can pull a subcomponent back.
    """
    return torch.where(pre > 1, 1 + LEAK * (pre - 1), torch.where(pre > 0, pre, torch.zeros_like(pre)))


class Importance(nn.Module):
    """γ of every site. `shapes`: site name → (d_in, C), in model order."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], gamma: Gamma, *, max_length: int | None = None) -> None:
        super().__init__()
        length = gamma.max_length or max_length
        if gamma.kind == "attention" and length is None:
            raise ConfigError("gamma.max_length: the attention γ needs the longest sequence it will see, in tokens; give a number")
        self.gamma = gamma
        groups: dict[tuple[int, int], list[str]] = {}
        for name, shape in shapes.items():
            groups.setdefault(shape, []).append(name)
        self.groups = nn.ModuleList(_Group(names, d_in=d_in, C=C, gamma=gamma, max_length=length) for (d_in, C), names in groups.items())

    @property
    def typed_groups(self) -> Sequence["_Group"]:
        return cast("Sequence[_Group]", self.groups)

    def initialise(self, generator: torch.Generator) -> None:
        """Fan-in normal weights, zero biases (the last: `gamma.output_bias`)."""
        for group in self.typed_groups:
            group.initialise(generator)

    def forward(self, inputs: Mapping[str, Tensor], U: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "*batch C"]]:
        """Pre-activations per site from the target's site inputs [batch, pos, d_in].

        U is used by the scalar γ alone, whose input is the inner activation. Raises `BatchError` for a sequence longer than the
        attention γ's tables.
        """
        pre: dict[str, Tensor] = {}
        for group in self.typed_groups:
            pre |= group(inputs, U)
        return {name: pre[name] for name in inputs}

    def site_parameters(self) -> dict[str, dict[str, Tensor]]:
        """Site name → parameter name → that site's slice, as views: what `importance.safetensors` holds."""
        return {
            name: {key: parameter[i] for key, parameter in group.named_parameters()}
            for group in self.typed_groups
            for i, name in enumerate(group.names)
        }


class _Group(nn.Module):
    """γ of same-shaped sites; every parameter leads with the site axis."""

    def __init__(self, names: Sequence[str], *, d_in: int, C: int, gamma: Gamma, max_length: int | None) -> None:
        super().__init__()
        self.names, self.gamma, self.max_length = tuple(names), gamma, max_length
        S, d, h = len(names), d_in, gamma.d_gate
        width = {"scalar": 1, "vector": d, "attention": 2 * d, "shared": d}[gamma.kind]

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(S, *shape))

        if gamma.kind == "attention":
            assert max_length is not None
            self.query, self.key, self.value = parameter(d, d), parameter(d, d), parameter(d, d)
            self.absolute = parameter(max_length, d)
            self.relative = parameter(2 * max_length) if gamma.relative == "offset" else parameter(2 * max_length, d)
        if gamma.kind == "shared":
            self.w_in, self.b_in = parameter(width, h), parameter(h)
            self.w_out, self.b_out = parameter(h, C), parameter(C)
        else:
            self.w_in, self.b_in = parameter(C, width, h), parameter(C, h)
            self.w_out, self.b_out = parameter(C, h), parameter(C)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        gamma, h = self.gamma, self.gamma.d_gate
        fan_in = {"w_in": self.w_in.shape[-2], "w_out": h, "b_in": None, "b_out": None}
        if gamma.kind == "attention":
            d = self.query.shape[-1]
            fan_in |= {"query": d, "key": d, "value": d, "absolute": d, "relative": None if gamma.relative == "offset" else d}
        for name, parameter in self.named_parameters():
            if fan_in[name] is None:
                parameter.zero_()
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * fan_in[name] ** -0.5)
        self.b_out.fill_(gamma.output_bias)
        if gamma.kind == "attention" and gamma.relative_init == "local":
            distance = (torch.arange(self.relative.shape[-1]) - self.absolute.shape[1]).abs().clamp(max=8)
            noise = 0.3 * torch.randn(self.relative.shape, generator=generator)
            self.relative.copy_(self.query.shape[-1] ** 0.5 * (noise - 0.7 * distance))

    def forward(self, inputs: Mapping[str, Tensor], U: Mapping[str, Tensor]) -> dict[str, Tensor]:
        batch = inputs[self.names[0]].shape[:-1]
        if self.gamma.kind == "scalar":
            rows = torch.stack([(inputs[name] @ U[name]).flatten(0, -2) for name in self.names])  # (S, N, C)
            pre = _ScalarMlps.apply(rows, self.w_in[:, :, 0], self.b_in, self.w_out, self.b_out)
        elif self.gamma.kind == "vector":
            pre = self._per_subcomponent(torch.stack([inputs[name].flatten(0, -2) for name in self.names]))
        elif self.gamma.kind == "shared":
            rows = torch.stack([inputs[name].flatten(0, -2) for name in self.names])
            hidden = F.gelu(torch.baddbmm(self.b_in[:, None], rows, self.w_in))
            pre = torch.baddbmm(self.b_out[:, None], hidden, self.w_out)
        else:
            self._require_fitting(batch)
            attended = self._attend(torch.stack([inputs[name] for name in self.names]))
            pre = self._per_subcomponent(attended.flatten(1, -2))
        return {name: site.unflatten(0, batch) for name, site in zip(self.names, pre, strict=True)}

    def _require_fitting(self, batch: tuple[int, ...]) -> None:
        if len(batch) != 2:
            raise BatchError(
                f"site {self.names[0]}: the attention γ needs inputs (batch, pos, d_in), but these lead with {tuple(batch)}; "
                "use gamma.kind vector"
            )
        longest = self.absolute.shape[1]
        if batch[1] > longest:
            raise BatchError(
                f"batch of {batch[1]} positions, but the attention γ's tables hold {longest}; "
                f"raise gamma.max_length and decompose anew, or shorten the batch"
            )

    def _per_subcomponent(self, rows: Float[Tensor, "site row width"]) -> Float[Tensor, "site row C"]:
        return _Mlps.apply(rows, self.w_in, self.b_in, self.w_out, self.b_out)

    def _attend(self, x: Float[Tensor, "site batch pos d_in"]) -> Float[Tensor, "site batch pos two_d_in"]:
        """Algorithm 1, lines 1-5: single-head attention over all positions, its output beside the positioned input."""
        n, d = x.shape[-2:]
        x_pos = x + self.absolute[:, None, :n]
        q, k, v = (torch.einsum("sbnd,sde->sbne", t, w) for t, w in ((x, self.query), (x, self.key), (x_pos, self.value)))
        if self.gamma.relative == "offset":
            attention = self._attend_by_offset(q, k, v)
        else:
            per_offset = torch.einsum("sbnd,sod->sbno", q, self.relative)  # (S, B, n, 2s)
            r = per_offset.gather(-1, self._offsets(n).expand(*per_offset.shape[:2], n, n))
            attention = F.scaled_dot_product_attention(q, k, v, attn_mask=r / d**0.5)
        return torch.cat([attention, x_pos], dim=-1)

    def _attend_by_offset(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "site batch pos d_in"]:
        n, d = q.shape[-2:]
        if q.device.type == "cuda" and n >= FLEX_LENGTH:
            return flex_by_offset(q, k, v, self.relative, compiled=True)
        r = (self.relative / d**0.5)[:, self._offsets(n)]  # (S, n, n)
        if q[..., 0].numel() * n <= SCORES:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=r[:, None].expand(*q.shape[:2], n, n))
        sequences = [
            torch.stack([checkpoint(_attend_once, *each, r[s], use_reentrant=False) for each in zip(q[s], k[s], v[s], strict=True)])
            for s in range(len(q))
        ]
        return torch.stack(sequences)

    def _offsets(self, n: int) -> Int[Tensor, "query key"]:
        """Key position - query position, as index into the 2s relative encodings (shifted to >= 1)."""
        place = torch.arange(n, device=self.relative.device)
        return place[None, :] - place[:, None] + self.absolute.shape[1]


def _attend_once(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """One sequence of one site; its scores are computed again for the gradient."""
    return F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None], attn_mask=r)[0, 0]


def flex_by_offset(
    q: Float[Tensor, "site batch pos d"],
    k: Float[Tensor, "site batch pos d"],
    v: Float[Tensor, "site batch pos d"],
    relative: Float[Tensor, "site offset"],
    *,
    compiled: bool,
) -> Float[Tensor, "site batch pos d"]:
    """softmax((q k^T + r) / sqrt(d)) v with r by offset, never holding the (pos, pos) scores: PyTorch's flex attention, sites as heads."""
    from torch.nn.attention.flex_attention import flex_attention

    half, root = relative.shape[-1] // 2, q.shape[-1] ** 0.5

    def add_relative(score: Tensor, _batch: Tensor, site: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + relative[site, key - query + half] / root

    function = _compiled_flex() if compiled else flex_attention
    return cast("Tensor", function(*(t.transpose(0, 1) for t in (q, k, v)), score_mod=add_relative)).transpose(0, 1)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


class _Mlps(torch.autograd.Function):
    """One MLP per subcomponent, all reading the same rows, as one product a chunk of rows; hidden units are never stored.

    A chunk's hidden units stay in cache; the backward pass computes them again. The gain is not arithmetic but memory traffic:
    the whole hidden tensor (site, row, C * d_gate) is written and read many times when it is kept.
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
        ctx.save_for_backward(rows, w_in, b_in, w_out)
        if native.serves(rows, w_in):
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
        if native.serves(rows, w_in):
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
def _mixed(before: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Float[Tensor, "site row C"]:
    """Every MLP's result from its hidden products (site, row, C * d_gate)."""
    hidden = F.gelu(before + b_in).unflatten(-1, w_out.shape[1:])
    return (hidden * w_out[:, None]).sum(-1) + b_out[:, None]


@fusible
def _mixed_backward(before: Tensor, b_in: Tensor, w_out: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_mixed` with respect to the hidden products, w_out and b_in, the last with an axis for rows."""
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
    """Rows of a chunk whose hidden units fit into the threads' caches, and memory for as many."""
    size = min(max(MIN_CHUNK, native.cached_numbers() // hidden), rows.shape[1])
    return size, rows.new_empty(hidden * size)


class _ScalarMlps(torch.autograd.Function):
    """One MLP per subcomponent, each reading its own number; hidden units are never stored, as in `_Mlps`."""

    @staticmethod
    def forward(
        ctx: Any,
        inner: Float[Tensor, "site row C"],
        w_in: Float[Tensor, "site C d_gate"],
        b_in: Float[Tensor, "site C d_gate"],
        w_out: Float[Tensor, "site C d_gate"],
        b_out: Float[Tensor, "site C"],
    ) -> Float[Tensor, "site row C"]:
        w_in = w_in.contiguous()
        ctx.save_for_backward(inner, w_in, b_in, w_out)
        pre = torch.empty_like(inner)
        for part in _chunks(inner, w_in):
            if native.serves(inner, w_in):
                for s in range(len(inner)):
                    x, out = inner[s, part], pre[s, part]
                    native.scalar_mlps_forward(x.shape[1], x, w_in[s], b_in[s], w_out[s], b_out[s], out, *x.shape, w_in.shape[-1])
            else:
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
        for part in _chunks(inner, w_in):
            if native.serves(inner, w_in):
                for s in range(len(inner)):
                    x, sums = inner[s, part], (grad_w_in[s], grad_b_in[s], grad_w_out[s], grad_b_out[s])
                    given = (x, w_in[s], b_in[s], w_out[s], grad[s, part], grad_inner[s, part])
                    native.scalar_mlps_backward(x.shape[1], *given, *sums, *x.shape, w_in.shape[-1])
            else:
                x, above = inner[:, part, :, None], grad[:, part, :, None]
                before = torch.addcmul(b_in[:, None], x, w_in[:, None])
                grad_w_out += F.gelu(before).mul_(above).sum(1)
                below = torch.ops.aten.gelu_backward(above * w_out[:, None], before)
                grad_w_in += (below * x).sum(1)
                grad_b_in += below.sum(1)
                grad_inner[:, part] = (below * w_in[:, None]).sum(-1)
                grad_b_out += above[..., 0].sum(1)
        return grad_inner, grad_w_in, grad_b_in, grad_w_out, grad_b_out


def _chunks(rows: Float[Tensor, "site row _"], w_in: Float[Tensor, "site C *_ d_gate"]) -> Iterator[slice]:
    """Slices of rows whose hidden units, of all sites, fit into a CPU's cache, or into a share of a GPU's memory."""
    elements = native.cached_numbers() if rows.device.type == "cpu" else GPU_CHUNK
    size = max(MIN_CHUNK, elements // (len(w_in) * w_in.shape[1] * w_in.shape[-1]))
    return (slice(start, min(start + size, rows.shape[1])) for start in range(0, rows.shape[1], size))
