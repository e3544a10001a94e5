"""The training step written the obvious way, to compare with: loops over sites and plans, one einsum over all hidden units.

It is what one would write first, without needless slowness: batched over subcomponents, in PyTorch's own operations; autograd keeps
every intermediate. The losses are those of Table 4; tests check that losses and gradients equal the library's.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paramlens.config.model import Config
from paramlens.method.decomposition import Decomposition
from paramlens.method.hooks import hooked, swapped_in
from paramlens.method.importance.network import Importance
from paramlens.method.losses.minimality import annealed_p

LOSSES = ("stochastic_recon", "stochastic_recon_layerwise", "recon", "faithfulness", "minimality")


class _Lower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor) -> Tensor:
        ctx.save_for_backward(pre)
        return pre.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (pre,) = ctx.saved_tensors
        return torch.where(pre <= 0, 0.01 * grad.clamp(max=0), torch.where(pre <= 1, grad, 0))


class NaiveStep(nn.Module):
    """U, V and γ of every site as the module's own parameters, copied from a decomposition. `forward` is one step."""

    def __init__(self, config: Config, decomposition: Decomposition, importance: Importance, *, max_length: int) -> None:
        super().__init__()
        self.config, self.max_length = config, max_length
        self._target = (decomposition.model,)
        self.sites = decomposition.sites
        self.U = nn.ParameterList(U.detach().clone() for U in decomposition.U.values())
        self.V = nn.ParameterList(V.detach().clone() for V in decomposition.V.values())
        of_site = importance.site_parameters()
        self.gamma = nn.ModuleList(
            nn.ParameterDict({key: value.detach().clone() for key, value in of_site[site.name].items()}) for site in self.sites
        )

    def forward(self, tokens: Tensor, step: int, noise: Callable[[str, str, Tensor], Tensor], layerwise: tuple[str, ...]) -> Tensor:
        """The weighted loss. noise(loss, site, g): numbers in [0, 1], shaped as g; layerwise: names of the sites to replace alone."""
        losses = self.config.losses
        logits, inputs = self._target_run(tokens)
        log_p = logits.log_softmax(-1)
        names = [site.name for site in self.sites]
        pre = {name: self._pre(i, inputs[name]) for i, name in enumerate(names)}
        g = {name: _Lower.apply(value) for name, value in pre.items()}

        def divergence(masks: Mapping[str, Tensor]) -> Tensor:
            log_q = self._masked_run(tokens, masks).log_softmax(-1)
            return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()

        def drawn(loss: str) -> dict[str, Tensor]:
            return {name: value + (1 - value) * noise(loss, name, value) for name, value in g.items()}

        total = losses.recon * divergence(g) + losses.stochastic_recon * divergence(drawn("stochastic_recon"))
        masks = drawn("stochastic_recon_layerwise")
        for name in layerwise:
            total = total + losses.stochastic_recon_layerwise / len(layerwise) * divergence({name: masks[name]})
        squares = [(site.W - U @ V).square().sum() for site, U, V in zip(self.sites, self.U, self.V, strict=True)]
        total = total + losses.faithfulness * sum(squares) / sum(site.W.numel() for site in self.sites)
        p, eps = annealed_p(losses, step, self.config.steps), losses.minimality_eps
        for value in pre.values():
            upper = torch.where(value > 1, 1 + 0.01 * (value - 1), torch.where(value > 0, value, 0))
            total = total + losses.minimality * ((upper + eps).pow(p) - eps**p).sum(-1).mean()
        return total

    def _target_run(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        inputs: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _module, args, _kwargs: inputs.__setitem__(name, args[0])

        with torch.no_grad(), hooked(before=[(site.place.module, keep(site.name)) for site in self.sites]):
            return self._target[0](tokens), inputs

    def _masked_run(self, tokens: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        def forward(U: Tensor, V: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda x: ((x @ U) * mask) @ V

        sites = zip(self.sites, self.U, self.V, strict=True)
        with swapped_in({site.place.module: forward(U, V, masks[site.name]) for site, U, V in sites if site.name in masks}):
            return self._target[0](tokens)

    def _pre(self, i: int, x: Tensor) -> Tensor:
        p = cast("nn.ParameterDict", self.gamma[i])
        hidden = F.gelu(HIDDEN[self.config.gamma.kind](x, self.U[i], p, self.max_length) + p["b_in"])
        return torch.einsum("bnch,ch->bnc", hidden, p["w_out"]) + p["b_out"]


def _scalar(x: Tensor, U: Tensor, p: Any, _: int) -> Tensor:
    return (x @ U)[..., None] * p["w_in"][:, 0]


def _vector(x: Tensor, _U: Tensor, p: Any, _: int) -> Tensor:
    return torch.einsum("bnd,cdh->bnch", x, p["w_in"])


def _attention(x: Tensor, U: Tensor, p: Any, max_length: int) -> Tensor:
    n, d = x.shape[1:]
    x_pos = x + p["absolute"][:n]
    q, k, v = x @ p["query"], x @ p["key"], x_pos @ p["value"]
    place = torch.arange(n, device=x.device)
    r = p["relative"][place[None] - place[:, None] + max_length]
    return _vector(torch.cat([((q @ k.mT + r) / d**0.5).softmax(-1) @ v, x_pos], dim=-1), U, p, max_length)


HIDDEN: dict[str, Callable[[Tensor, Tensor, Any, int], Tensor]] = {"scalar": _scalar, "vector": _vector, "attention": _attention}
"""`gamma.kind` → function of a site's x, U and parameters: hidden units of its MLPs before bias and GELU."""
