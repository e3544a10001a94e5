"""The attention γ (eq. 4, Algorithm 1): each site has one small attention layer over all positions, shared by its C MLPs."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from paramlens.errors import BatchError
from paramlens.kernels.flex import FLEX_LENGTH, flex_by_offset
from paramlens.kernels.mlps import Mlps
from paramlens.method.importance.kind import GammaKind, Parameter, mlps, require_positions
from paramlens.method.importance.settings import Gamma

SCORES = 2**27
"""Maximum number of γ's attention scores in memory; with more, sequences run one by one and the backward pass computes them again."""


class AttentionGamma(GammaKind):
    """Each subcomponent's MLP reads the attention's output and the input with its position encoding, 2 d_in numbers.

    The attention has one head, one layer and no output projection, and is not causal. Its parameter `relative` is r in eq. 4: one number
    per offset, or a table contracted with q.
    """

    has_table = True

    @classmethod
    def parameters_of_site(cls, gamma: Gamma, *, d_in: int, max_length: int | None) -> dict[str, Parameter]:
        assert max_length is not None
        projection = Parameter((d_in, d_in), fan_in=d_in)
        by_query = gamma.relative == "query"
        return {
            "query": projection,
            "key": projection,
            "value": projection,
            "absolute": Parameter((max_length, d_in), fan_in=d_in),
            "relative": Parameter(
                (2 * max_length, d_in) if by_query else (2 * max_length,),
                fan_in=d_in if by_query else None,
                lr_factor=gamma.relative_lr,
            ),
            **cls.readers(2 * d_in, gamma),
        }

    @classmethod
    def readers(cls, width: int, gamma: Gamma) -> dict[str, Parameter]:
        """Parameters of what reads the attention's output: one MLP per subcomponent."""
        return mlps(width, gamma)

    def read(self, rows: Float[Tensor, "site row width"]) -> Float[Tensor, "site row C"]:
        """Pre-activations from the attention's output and the encoded input (line 6)."""
        return Mlps.apply(rows, self.w_in, self.b_in, self.w_out, self.b_out)

    @classmethod
    def activations(cls, gamma: Gamma, *, d_in: int, C: int, length: int) -> int:
        return 9 * d_in + 4 * length

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set the first values as declared; with `relative_init` local, r / sqrt(d) starts at -0.7 min(|offset|, 8) plus noise."""
        super().initialise(generator)
        if self.gamma.relative_init == "local":
            distance = (torch.arange(self.relative.shape[-1]) - self.absolute.shape[1]).abs().clamp(max=8)
            noise = 0.3 * torch.randn(self.relative.shape, generator=generator)
            self.relative.copy_(self.query.shape[-1] ** 0.5 * (noise - 0.7 * distance))

    def forward(
        self, x: Sequence[Float[Tensor, "*batch d_in"]], U: Sequence[Float[Tensor, "_ C"]], present: Bool[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "site row C"]:
        """Compute Algorithm 1. Raises `BatchError` for inputs without a position axis or with more positions than `gamma.max_length`."""
        self._require_fitting(x[0].shape[:-1])
        seen = torch.stack(list(x))  # (S, B, n, d)
        x_pos = seen + self._absolute(seen.shape[2], present)  # line 1
        q, k, v = (torch.einsum("sbnd,sde->sbne", t, w) for t, w in ((seen, self.query), (seen, self.key), (x_pos, self.value)))  # line 2
        combined = torch.cat([self._attend(q, k, v, present), x_pos], dim=-1)  # lines 3 to 5
        return self.read(combined.flatten(1, -2))  # line 6

    def _require_fitting(self, batch: tuple[int, ...]) -> None:
        require_positions(self.gamma, self.names[0], batch)
        longest = self.gamma.max_length
        if longest is not None and batch[1] > longest:
            raise BatchError(
                f"batch of {batch[1]} positions, but gamma.max_length is {longest}; give gamma.max_length {batch[1]}, or shorten the batch"
            )

    def _absolute(self, n: int, present: Bool[Tensor, "batch pos"] | None) -> Float[Tensor, "site #batch pos d_in"]:
        """Absolute encodings, counted from a sequence's first present position; positions beyond the table use its last entry."""
        longest = self.absolute.shape[1]
        if present is None:
            return self.absolute[:, None, torch.arange(n).clamp(max=longest - 1)] if n > longest else self.absolute[:, None, :n]
        place = (present.cumsum(1) - 1).clamp(0, longest - 1)
        return self.absolute[:, place]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, present: Bool[Tensor, "batch pos"] | None) -> Float[Tensor, "site batch pos d_in"]:
        """Lines 3 and 4 of Algorithm 1: softmax((q k^T + r) / sqrt(d)) v over all present positions."""
        n, d = q.shape[-2:]
        if self.gamma.relative == "query":
            per_offset = torch.einsum("sbnd,sod->sbno", q, self.relative)  # (S, B, n, 2s)
            r = per_offset.gather(-1, self._offsets(n).expand(*per_offset.shape[:2], n, n))
            return _softmax_attention(q, k, v, r / d**0.5, present)
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
        """Key position - query position, as index (1 to 2s - 1; 0 is unused) into the 2s relative encodings; beyond the table its ends."""
        place, longest = torch.arange(n, device=self.relative.device), self.absolute.shape[1]
        return (place[None, :] - place[:, None] + longest).clamp(1, 2 * longest - 1)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, r: Tensor, present: Bool[Tensor, "*batch pos"] | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + r) v over the present keys; the scores stay in memory.

    `F.scaled_dot_product_attention` gives the same, but is slower where the bias needs a gradient.
    """
    scores = q * q.shape[-1] ** -0.5 @ k.mT + r
    if present is not None:
        scores = scores.masked_fill(~present[..., None, :], -torch.inf)
    return scores.softmax(-1) @ v
