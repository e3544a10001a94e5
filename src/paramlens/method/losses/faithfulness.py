"""Faithfulness (eq. 1): how far U V is from W."""

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.method.decomposition import Decomposition
from paramlens.method.losses.loss import DirectLoss, register


def faithfulness(decomposition: Decomposition) -> Float[Tensor, ""]:
    """Mean squared difference of W and U V (eq. 1): Σ_sites ‖W - U V‖² / Σ_sites (entries of W)."""
    U, V = decomposition.U, decomposition.V
    squares = [(site.W - U[site.name] @ V[site.name]).square().sum() for site in decomposition.sites]
    return torch.stack(squares).sum() / sum(site.W.numel() for site in decomposition.sites)


@torch.no_grad()
def left_out(decomposition: Decomposition) -> dict[str, float]:
    """What U V leaves out of the weights of all sites: faithfulness, and a figure relative to the weights.

    faithfulness_relative: Σ ‖W - U V‖² / Σ ‖W‖². If the remainder Δ = W - U V is a component, nothing is left out; then the figure is
    remainder: the root of that share, ‖Δ‖ / ‖W‖.
    """
    squares = sum(site.W.double().square().sum().item() for site in decomposition.sites)
    found = faithfulness(decomposition).item()
    share = found * sum(site.W.numel() for site in decomposition.sites) / squares
    return {"faithfulness": found} | ({"remainder": share**0.5} if decomposition.delta else {"faithfulness_relative": share})


register(DirectLoss("faithfulness", lambda known: faithfulness(known.decomposition)))
