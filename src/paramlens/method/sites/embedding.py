"""Embedding tables: x is the one-hot vector of a token id, so that x @ W is a row of the table W [vocabulary, d].

One-hot vectors are never built: x is stored as ids [batch, pos, 1], and x @ U is the rows of U with these ids. The input of γ is the
row that the target looks up, because a vector of the vocabulary's width would be too large.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paramlens.method.masks import Replacement, masks_of
from paramlens.method.sites.parameter import ParameterPlace, ParameterSite, named
from paramlens.method.sites.site import Offer


class EmbeddingSite(ParameterSite):
    """An embedding table: nn.Embedding's weight, or a parameter `W_E` of TransformerLens."""

    looked_up = True

    @property
    def d_seen(self) -> int:
        return self.d_out

    def seen(self, x: Int[Tensor, "*batch 1"]) -> Float[Tensor, "*batch d_out"]:
        """The row of W that the target looks up."""
        return self.product(x)

    def vectors(self, x: Int[Tensor, "*batch 1"]) -> Float[Tensor, "*batch d_in"]:
        return F.one_hot(x[..., 0].long(), self.d_in).to(self.stored.dtype)

    def read(self, x: Int[Tensor, "*batch 1"], U: Float[Tensor, "d_in C"]) -> Float[Tensor, "*batch C"]:
        return F.embedding(x[..., 0], U)

    def masked(
        self, x: Tensor, U: Float[Tensor, "d_in C"], V: Float[Tensor, "C d_out"], replacements: Sequence[Replacement]
    ) -> Float[Tensor, "*batch d_out"]:
        return (self.read(x, U) * torch.cat(masks_of(replacements))) @ V


def offers(_model: nn.Module, name: str, module: nn.Module) -> Iterator[Offer]:
    """The table of an nn.Embedding, with the module's name, or a parameter `W_E`."""
    place = ParameterPlace(module)
    if isinstance(module, nn.Embedding):
        yield Offer(EmbeddingSite(name, place, "weight"), name, rank=2)
    elif "W_E" in dict(module.named_parameters(recurse=False)):
        yield Offer(EmbeddingSite(named(name, "W_E"), place, "W_E"), named(name, "W_E"), rank=2)
