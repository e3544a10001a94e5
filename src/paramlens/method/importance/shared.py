"""The shared γ (ours), for when one MLP per subcomponent does not fit into memory."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from paramlens.method.importance.kind import GammaKind, Parameter, shared_mlp
from paramlens.method.importance.settings import Gamma


class SharedGamma(GammaKind):
    """One MLP d_in → d_gate → C for a whole site."""

    saves_memory = True

    @classmethod
    def parameters_of_site(cls, gamma: Gamma, *, d_in: int, max_length: int | None) -> dict[str, Parameter]:
        return shared_mlp(d_in, gamma)

    @classmethod
    def activations(cls, gamma: Gamma, *, d_in: int, C: int, length: int) -> int:
        return d_in + 4 * gamma.d_gate

    def forward(
        self, x: Sequence[Float[Tensor, "*batch d_in"]], U: Sequence[Float[Tensor, "_ C"]], present: Bool[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "site row C"]:
        return shared_outputs(self, torch.stack([x_site.flatten(0, -2) for x_site in x]))


def shared_outputs(group: GammaKind, rows: Float[Tensor, "site row width"]) -> Float[Tensor, "site row C"]:
    """The outputs of each site's one MLP, whose parameters are those of `shared_mlp`."""
    hidden = F.gelu(torch.baddbmm(group.b_in[:, None], rows, group.w_in))
    return torch.baddbmm(group.b_out[:, None], hidden, group.w_out)
