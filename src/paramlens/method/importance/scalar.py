"""The scalar γ, the cheapest kind."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paramlens.kernels.mlps import ScalarMlps
from paramlens.method.importance.kind import GammaKind, Parameter, mlps
from paramlens.method.importance.settings import Gamma


class ScalarGamma(GammaKind):
    """Each subcomponent's MLP reads its own inner activation x U, one number; the gradient reaches U."""

    reads_inner = True
    saves_memory = True

    @classmethod
    def parameters_of_site(cls, gamma: Gamma, *, d_in: int, max_length: int | None) -> dict[str, Parameter]:
        return mlps(1, gamma)

    @classmethod
    def activations(cls, gamma: Gamma, *, d_in: int, C: int, length: int) -> int:
        return 2 * C

    def forward(
        self, x: Sequence[Float[Tensor, "*batch d_in"]], U: Sequence[Float[Tensor, "d_in C"]], present: Bool[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "site row C"]:
        inner = torch.stack([(x_site @ U_site).flatten(0, -2) for x_site, U_site in zip(x, U, strict=True)])
        return ScalarMlps.apply(inner, self.w_in[:, :, 0], self.b_in, self.w_out, self.b_out)
