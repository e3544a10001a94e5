"""The vector γ, used for GPT-2 in Figure 6."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paramlens.kernels.mlps import Mlps
from paramlens.method.importance.kind import GammaKind, Parameter, mlps
from paramlens.method.importance.settings import Gamma


class VectorGamma(GammaKind):
    """Each subcomponent's MLP reads the site's whole input x, d_in numbers."""

    @classmethod
    def parameters_of_site(cls, gamma: Gamma, *, d_in: int, max_length: int | None) -> dict[str, Parameter]:
        return mlps(d_in, gamma)

    @classmethod
    def activations(cls, gamma: Gamma, *, d_in: int, C: int, length: int) -> int:
        return d_in

    def forward(
        self, x: Sequence[Float[Tensor, "*batch d_in"]], U: Sequence[Float[Tensor, "_ C"]], present: Bool[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "site row C"]:
        rows = torch.stack([x_site.flatten(0, -2) for x_site in x])
        return Mlps.apply(rows, self.w_in, self.b_in, self.w_out, self.b_out)
