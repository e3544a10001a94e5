"""Attention patterns of the target and of masked runs, and how far apart they are (Table 1c)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paramlens.decomposition import Decomposition, Plan
from paramlens.masks import Replacement
from paramlens.tasks import Batch


def attention_divergence(
    decomposition: Decomposition, batch: Batch, g: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, Float[Tensor, "batch query"]]:
    """KL(target ‖ masked) of every query's attention in nats, mean over heads; masks are g at all sites (Table 1c)."""
    target = attention_patterns(decomposition, batch, [{}], names)
    masked = attention_patterns(decomposition, batch, [{site: Replacement(value) for site, value in g.items()}], names)
    divergences: dict[str, Tensor] = {}
    for name, p in target.items():
        q = masked[name].clamp(min=torch.finfo(p.dtype).tiny)  # where q underflows to 0 the divergence is large, not infinite
        divergences[name] = (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1).mean(1)
    return divergences


@torch.no_grad()
def attention_patterns(
    decomposition: Decomposition, batch: Batch, plans: Sequence[Plan], names: Sequence[str]
) -> dict[str, Float[Tensor, "batch head query key"]]:
    """The attention patterns of a masked run, by module name; an empty plan is the target itself."""
    with captured(decomposition.model, names) as seen:
        decomposition.masked_run(batch.inputs, plans)
    return seen


@contextmanager
def captured(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While active, what the modules `names` put out is kept by name: the dictionary it yields."""
    seen: dict[str, Tensor] = {}
    hooks = [model.get_submodule(name).register_forward_hook(partial(_keep, seen, name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _keep(seen: dict[str, Tensor], name: str, _module: nn.Module, _args: object, pattern: Tensor) -> None:
    seen[name] = pattern
