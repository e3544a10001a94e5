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


def mean_square(decomposition: Decomposition) -> float:
    """Mean squared entry of the weights of all sites, with which faithfulness is compared."""
    squares = sum(site.W.double().square().sum().item() for site in decomposition.sites)
    return squares / sum(site.W.numel() for site in decomposition.sites)


register(DirectLoss("faithfulness", lambda known: faithfulness(known.decomposition)))
