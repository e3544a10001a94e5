"""The attention γ with one MLP per site (ours): what it reads is that of eq. 4, and its size hardly depends on C."""

from jaxtyping import Float
from torch import Tensor

from paramlens.method.importance.attention import AttentionGamma
from paramlens.method.importance.kind import Parameter, shared_mlp
from paramlens.method.importance.settings import Gamma
from paramlens.method.importance.shared import shared_outputs


class AttentionSharedGamma(AttentionGamma):
    """One MLP 2 d_in → d_gate → C for a whole site, after the attention of Algorithm 1."""

    @classmethod
    def activations(cls, gamma: Gamma, *, d_in: int, C: int, length: int) -> int:
        return super().activations(gamma, d_in=d_in, C=C, length=length) + 4 * gamma.d_gate

    @classmethod
    def readers(cls, width: int, gamma: Gamma) -> dict[str, Parameter]:
        return shared_mlp(width, gamma)

    def read(self, rows: Float[Tensor, "site row width"]) -> Float[Tensor, "site row C"]:
        return shared_outputs(self, rows)
