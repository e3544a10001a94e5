"""Causal importance g = σ(γ(x)) in [0, 1]: for every token, how much of each subcomponent the output needs (§4.1, eq. 4).

γ maps what the *target* computes, never a masked run, to a pre-activation per subcomponent; the leaky-hard-sigmoid pair turns
that into g (`lower`) and into what minimality pushes on (`upper`). Sites of the same shape form a group whose networks are
computed together: parameters carry a leading `site` axis, and one batched product serves the group.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from paramlens.errors import BatchError, ConfigError
from paramlens.kernels import native
from paramlens.kernels.flex import FLEX_LENGTH, flex_by_offset
from paramlens.kernels.mlps import Mlps, ScalarMlps
from paramlens.method.settings import Gamma

LEAK = 0.01
"""Slope of the leaky side of both sigmoids."""

SCORES = 2**27
"""Attention scores of γ held at once, and kept for the gradient; beyond it, sequences go one by one."""


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

    @property
    def table_length(self) -> int | None:
        """Positions that the attention γ's tables hold; None for every other γ. Further positions share their last entries."""
        return self.typed_groups[0].max_length if self.gamma.kind == "attention" else None

    def forward(
        self, inputs: Mapping[str, Tensor], U: Mapping[str, Tensor], present: Bool[Tensor, "batch pos"] | None = None
    ) -> dict[str, Float[Tensor, "*batch C"]]:
        """Pre-activations per site from the target's site inputs [batch, pos, d_in].

        U is used by the scalar γ alone, whose input is the inner activation. At positions that are not `present` (defaults to all)
        pre-activations are 0: nothing is important there, and nothing costs; and no other position attends to them.
        Raises `BatchError` for a sequence longer than `gamma.max_length`, where that was given, and for inputs that `present` does not fit.
        """
        pre: dict[str, Tensor] = {}
        for group in self.typed_groups:
            pre |= group(inputs, U, present)
        if present is None:
            return {name: pre[name] for name in inputs}
        for name, value in pre.items():
            if value.shape[:-1] != present.shape:
                raise BatchError(
                    f"site {name}: inputs lead with {tuple(value.shape[:-1])}, the mask of present positions with {tuple(present.shape)}; "
                    "leave the site out, or give batches without padding"
                )
        return {name: pre[name].masked_fill(~present[..., None], 0) for name in inputs}

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

    def forward(self, inputs: Mapping[str, Tensor], U: Mapping[str, Tensor], present: Tensor | None) -> dict[str, Tensor]:
        batch = inputs[self.names[0]].shape[:-1]
        if self.gamma.kind == "scalar":
            rows = torch.stack([(inputs[name] @ U[name]).flatten(0, -2) for name in self.names])  # (S, N, C)
            pre = ScalarMlps.apply(rows, self.w_in[:, :, 0], self.b_in, self.w_out, self.b_out)
        elif self.gamma.kind == "vector":
            pre = self._per_subcomponent(torch.stack([inputs[name].flatten(0, -2) for name in self.names]))
        elif self.gamma.kind == "shared":
            rows = torch.stack([inputs[name].flatten(0, -2) for name in self.names])
            hidden = F.gelu(torch.baddbmm(self.b_in[:, None], rows, self.w_in))
            pre = torch.baddbmm(self.b_out[:, None], hidden, self.w_out)
        else:
            self._require_fitting(batch)
            attended = self._attend(torch.stack([inputs[name] for name in self.names]), present)
            pre = self._per_subcomponent(attended.flatten(1, -2))
        return {name: site.unflatten(0, batch) for name, site in zip(self.names, pre, strict=True)}

    def _require_fitting(self, batch: tuple[int, ...]) -> None:
        if len(batch) != 2:
            raise BatchError(
                f"site {self.names[0]}: the attention γ needs inputs (batch, pos, d_in), but these lead with {tuple(batch)}; "
                "use gamma.kind vector"
            )
        longest = self.gamma.max_length
        if longest is not None and batch[1] > longest:
            raise BatchError(
                f"batch of {batch[1]} positions, but gamma.max_length is {longest}; give gamma.max_length {batch[1]}, or shorten the batch"
            )

    def _per_subcomponent(self, rows: Float[Tensor, "site row width"]) -> Float[Tensor, "site row C"]:
        return Mlps.apply(rows, self.w_in, self.b_in, self.w_out, self.b_out)

    def _attend(
        self, x: Float[Tensor, "site batch pos d_in"], present: Bool[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "site batch pos two_d_in"]:
        """Algorithm 1, lines 1-5: single-head attention over all present positions, its output beside the positioned input."""
        n, d = x.shape[-2:]
        x_pos = x + self._absolute(n, present)
        q, k, v = (torch.einsum("sbnd,sde->sbne", t, w) for t, w in ((x, self.query), (x, self.key), (x_pos, self.value)))
        if self.gamma.relative == "offset":
            attention = self._attend_by_offset(q, k, v, present)
        else:
            per_offset = torch.einsum("sbnd,sod->sbno", q, self.relative)  # (S, B, n, 2s)
            r = per_offset.gather(-1, self._offsets(n).expand(*per_offset.shape[:2], n, n))
            attention = _softmax_attention(q, k, v, r / d**0.5, present)
        return torch.cat([attention, x_pos], dim=-1)

    def _absolute(self, n: int, present: Bool[Tensor, "batch pos"] | None) -> Float[Tensor, "site #batch pos d_in"]:
        """Absolute encodings, counted from a sequence's first present position; beyond the table, its last entry."""
        longest = self.absolute.shape[1]
        if present is None:
            return self.absolute[:, None, torch.arange(n).clamp(max=longest - 1)] if n > longest else self.absolute[:, None, :n]
        place = (present.cumsum(1) - 1).clamp(0, longest - 1)
        return self.absolute[:, place]

    def _attend_by_offset(
        self, q: Tensor, k: Tensor, v: Tensor, present: Bool[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "site batch pos d_in"]:
        n, d = q.shape[-2:]
        if q.device.type == "cuda" and n >= FLEX_LENGTH:
            return flex_by_offset(q, k, v, self.relative, present, compiled=True)
        r = (self.relative / d**0.5)[:, self._offsets(n)]  # (S, n, n)
        if q[..., 0].numel() * n <= SCORES:
            return _softmax_attention(q, k, v, r[:, None], present)
        rows = [None] * q.shape[1] if present is None else list(present)
        sequences = [
            torch.stack(
                [
                    checkpoint(_softmax_attention, *each, r[s], own, use_reentrant=False)
                    for *each, own in zip(q[s], k[s], v[s], rows, strict=True)
                ]
            )
            for s in range(len(q))
        ]
        return torch.stack(sequences)

    def _offsets(self, n: int) -> Int[Tensor, "query key"]:
        """Key position - query position, as index into the 2s relative encodings (shifted to >= 1); beyond the table, its ends."""
        place, longest = torch.arange(n, device=self.relative.device), self.absolute.shape[1]
        return (place[None, :] - place[:, None] + longest).clamp(1, 2 * longest - 1)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, r: Tensor, present: Bool[Tensor, "*batch pos"] | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + r) v over the present keys; the scores are held.

    PyTorch's own function takes this way for a bias with a gradient, more slowly.
    """
    scores = q * q.shape[-1] ** -0.5 @ k.mT + r
    if present is not None:
        scores = scores.masked_fill(~present[..., None, :], -torch.inf)
    return scores.softmax(-1) @ v
