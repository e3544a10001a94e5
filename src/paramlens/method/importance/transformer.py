"""The transformer γ (ours, after the method's successors): one small transformer reads every site's input and answers for all sites."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from paramlens.errors import BatchError
from paramlens.method.importance.kind import GammaKind, Parameter, Trunk, require_positions
from paramlens.method.importance.settings import Gamma

BASE = 10_000.0
"""Base of the rotary position encodings' wavelengths."""

EPSILON = 1e-6
"""Added to the mean square in a norm."""


class TransformerTrunk(Trunk):
    """Pre-norm blocks of bidirectional attention with rotary position encodings and an MLP, on a projection of all sites' inputs.

    At every position each site's input is divided by its root mean square first. Norms have no parameters.
    """

    @classmethod
    def parameters_of(cls, gamma: Gamma, *, d_in: int) -> dict[str, Parameter]:
        w, layers = gamma.width, gamma.layers
        return {
            "w_in": Parameter((d_in, w), fan_in=d_in),
            "attend": Parameter((layers, w, 3 * w), fan_in=w),
            "attended": Parameter((layers, w, w), fan_in=2 * layers * w),
            "up": Parameter((layers, w, 4 * w), fan_in=w),
            "b_up": Parameter((layers, 4 * w)),
            "down": Parameter((layers, 4 * w, w), fan_in=2 * layers * 4 * w),
            "b_down": Parameter((layers, w)),
        }

    @classmethod
    def activations(cls, gamma: Gamma, *, length: int) -> int:
        return (20 * gamma.layers + 2) * gamma.width

    def forward(self, inputs: Mapping[str, Tensor], present: Bool[Tensor, "batch pos"] | None) -> Float[Tensor, "batch pos width"]:
        """Raises `BatchError` for inputs without a position axis, and if sites differ in their numbers of rows or positions."""
        self._require_fitting(inputs)
        x = torch.cat([_normed(inputs[name]) for name in self.names], dim=-1) @ self.w_in
        for layer in range(self.gamma.layers):
            x = x + self._attended(_normed(x), layer, present)
            hidden = F.gelu(_normed(x) @ self.up[layer] + self.b_up[layer])
            x = x + hidden @ self.down[layer] + self.b_down[layer]
        return _normed(x)

    def _attended(self, x: Tensor, layer: int, present: Bool[Tensor, "batch pos"] | None) -> Float[Tensor, "batch pos width"]:
        q, k, v = (x @ self.attend[layer]).unflatten(-1, (3, self.gamma.heads, -1)).permute(2, 0, 3, 1, 4)  # (batch, head, pos, d)
        seen = None if present is None else present[:, None, None]
        mixed = F.scaled_dot_product_attention(_rotated(q), _rotated(k), v, attn_mask=seen)
        return mixed.transpose(1, 2).flatten(2) @ self.attended[layer]

    def _require_fitting(self, inputs: Mapping[str, Tensor]) -> None:
        first = self.names[0]
        for name in self.names:
            batch = inputs[name].shape[:-1]
            require_positions(self.gamma, name, batch)
            if batch != inputs[first].shape[:-1]:
                raise BatchError(
                    f"site {name}: the {self.gamma.kind} γ needs inputs (batch, pos, d_in) with one (batch, pos) at all sites, but these "
                    f"have the leading axes {tuple(batch)}, those of {first} {tuple(inputs[first].shape[:-1])}; use gamma.kind vector"
                )


class TransformerGamma(GammaKind):
    """One linear layer width → C per site, on what the trunk makes of the inputs of all sites."""

    trunk = TransformerTrunk

    @classmethod
    def parameters_of_site(cls, gamma: Gamma, *, d_in: int, max_length: int | None) -> dict[str, Parameter]:
        return {"w_out": Parameter((gamma.width, "C"), fan_in=gamma.width), "b_out": Parameter(("C",), start=gamma.output_bias)}

    @classmethod
    def activations(cls, gamma: Gamma, *, d_in: int, C: int, length: int) -> int:
        return d_in

    def forward(
        self, x: Sequence[Float[Tensor, "*batch width"]], U: Sequence[Float[Tensor, "_ C"]], present: Bool[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "site row C"]:
        rows = x[0].flatten(0, -2)
        return torch.baddbmm(self.b_out[:, None], rows.expand(len(x), *rows.shape), self.w_out)


def _normed(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    return F.rms_norm(x, x.shape[-1:], eps=EPSILON)


def _rotated(x: Float[Tensor, "batch head pos d"]) -> Float[Tensor, "batch head pos d"]:
    """Entries i and i + d / 2 of position n turned by the angle n BASE^(-2 i / d)."""
    half = x.shape[-1] // 2
    place, turn = (torch.arange(size, device=x.device, dtype=x.dtype) for size in (x.shape[-2], half))
    angle = place[:, None] * BASE ** (-turn / half)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)
