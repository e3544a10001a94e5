"""How far each site's output is from that of its important subcomponents alone. Ours; the paper has no such loss."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paramlens.method.decomposition import Decomposition, TargetRun
from paramlens.method.losses.loss import DirectLoss, register


def local_loss(
    decomposition: Decomposition,
    target: TargetRun,
    g: Mapping[str, Float[Tensor, "*batch C"]],
    *,
    present: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """Σ ‖x W - ((x U) * g) V‖² / Σ ‖x W‖² over a site's positions where any g is above 0, mean over sites.

    No gradient reaches g: the important subcomponents must write what W writes at that token; the loss must not make more important.
    """
    U, V, shares = decomposition.U, decomposition.V, list[Tensor]()
    for site in decomposition.sites:
        x, mask = target.inputs[site.name], g[site.name].detach()
        on = (mask > 0).any(-1) if present is None else (mask > 0).any(-1) & present
        written = site.product(x)
        missing = (written - (site.read(x, U[site.name]) * mask) @ V[site.name]) * on[..., None]
        shares.append(missing.square().sum() / (written * on[..., None]).square().sum().clamp(min=torch.finfo(written.dtype).tiny))
    return torch.stack(shares).mean()


register(DirectLoss("local", lambda known: local_loss(known.decomposition, known.target, known.g, present=known.batch.present)))
