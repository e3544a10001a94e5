"""The shared γ (ours), for when one MLP per subcomponent does not fit into memory."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from paramlens.method.importance.kind import GammaKind, Parameter
from paramlens.method.importance.settings import Gamma


class SharedGamma(GammaKind):
    """One MLP d_in → d_gate → C for a whole site."""

    saves_memory = True

    @classmethod
    def parameters_of_site(cls, gamma: Gamma, *, d_in: int, max_length: int | None) -> dict[str, Parameter]:
        h = gamma.d_gate
        return {
            "w_in": Parameter((d_in, h), fan_in=d_in),
            "b_in": Parameter((h,)),
            "w_out": Parameter((h, "C"), fan_in=h),
            "b_out": Parameter(("C",), start=gamma.output_bias),
        }

    @classmethod
    def activations(cls, gamma: Gamma, *, d_in: int, C: int, length: int) -> int:
        return d_in + 4 * gamma.d_gate

    def forward(
        self, x: Sequence[Float[Tensor, "*batch d_in"]], U: Sequence[Float[Tensor, "_ C"]], present: Bool[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "site row C"]:
        rows = torch.stack([x_site.flatten(0, -2) for x_site in x])
        hidden = F.gelu(torch.baddbmm(self.b_in[:, None], rows, self.w_in))
        return torch.baddbmm(self.b_out[:, None], hidden, self.w_out)
