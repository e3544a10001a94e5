"""What a configuration will need, told before anything is started: parameters and bytes by part."""

from dataclasses import asdict, dataclass

import torch

from paramlens import native
from paramlens.config import Config
from paramlens.importance import Importance
from paramlens.losses import stack_size
from paramlens.sites import Site

_ADAM_STATE = 2
"""Moments per parameter."""


@dataclass(frozen=True)
class Diagnosis:
    """parameters, bytes: part → count. bytes holds weights, gradients, optimizer state, and an estimate of one step's activations."""

    sites: int
    parameters: dict[str, int]
    bytes: dict[str, int]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def diagnose(config: Config, sites: tuple[Site, ...], *, length: int, vocabulary: int) -> Diagnosis:
    """Count U, V and γ of `sites` and estimate a step's memory at `config.batch` sequences of `length` tokens.

    Activations are the most that one step holds: γ's inputs, and pre-activations, importances and their gradients; in one pass of
    plans the sites' inputs and outputs, the logits and their gradients, and, where no compiled loop recomputes them, masks and
    inner activations. What the target keeps between its sites (attention patterns, say) is not counted.
    """
    with torch.device("meta"):
        shapes = {site.name: (site.d_in, config.C) for site in sites}
        gamma = sum(value.numel() for value in Importance(shapes, config.gamma, max_length=length).parameters())
    factors = sum((site.d_in + site.d_out) * config.C for site in sites)
    word = torch.finfo(getattr(torch, config.dtype)).bits // 8
    positions = config.batch * length
    kind, d_gate, C = config.gamma.kind, config.gamma.d_gate, config.C
    read = sum({"scalar": C, "vector": site.d_in, "attention": 6 * site.d_in, "shared": site.d_in}[kind] for site in sites)
    hidden = len(sites) * {"scalar": 0, "vector": 0, "attention": 2 * length, "shared": 2 * d_gate}[kind]
    samples, losses = config.losses.samples, config.losses
    whole = samples * bool(losses.stochastic_recon) + bool(losses.recon)
    whole += samples * bool(losses.stochastic_recon_partial) + bool(losses.recon_partial)
    alone = len(sites) if losses.layerwise_sites == "all" else min(len(sites), losses.layerwise_sites)
    each = alone * (samples * bool(losses.stochastic_recon_layerwise) + bool(losses.recon_layerwise))
    seen = config.batch if config.last_token_only else positions
    plans = min(whole + each, stack_size(seen * vocabulary, device=torch.device(config.device).type))
    replaced = min(whole, plans) * len(sites) + max(0, plans - whole)
    compiled = native.serves(torch.empty(0, dtype=getattr(torch, config.dtype), device="cpu" if config.device == "cpu" else "meta"))
    activations = {
        "gamma activations": (read + hidden + 4 * len(sites) * C) * positions * word,
        "masks and inner activations": 0 if compiled else 3 * replaced * positions * C * word,
        "site inputs and outputs": plans * sum(site.d_in + site.d_out for site in sites) * positions * word,
        "logits": 3 * plans * seen * vocabulary * word,
    }
    trained = factors + gamma
    return Diagnosis(
        sites=len(sites),
        parameters={"U and V": factors, "gamma": gamma, "trained": trained, "decomposed weights": sum(s.d_in * s.d_out for s in sites)},
        bytes={
            "U and V": factors * word,
            "gamma": gamma * word,
            "gradients": trained * word,
            "optimizer": _ADAM_STATE * trained * word,
            **activations,
            "total": (2 + _ADAM_STATE) * trained * word + sum(activations.values()),
        },
    )
