"""Attention patterns of the target and of masked runs, and the divergence between them (Table 1c)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paramlens.method.batch import Batch
from paramlens.method.decomposition import Decomposition, Plan
from paramlens.method.hooks import hooked
from paramlens.method.task import Link


def attention_divergence(
    target: Float[Tensor, "batch head query key"], masked: Float[Tensor, "batch head query key"]
) -> Float[Tensor, "batch query"]:
    """KL(target ‖ masked) of every query's attention, in nats, mean over heads (Table 1c)."""
    masked = masked.clamp(min=torch.finfo(masked.dtype).tiny)  # keeps the divergence finite where it underflows to 0
    return (torch.xlogy(target, target) - torch.xlogy(target, masked)).sum(-1).mean(1)


def attention_by_role(
    pattern: Float[Tensor, "batch head query key"], role_index: Int[Tensor, "batch pos"], count: int
) -> Float[Tensor, "query_role key_role"]:
    """Attention that queries of a role give to all keys of a role together, mean over queries and heads; rows sum to 1.

    A role index of -1 means no role. The row of a role that does not occur is 0.
    """
    keys = (F.one_hot(role_index.clamp(min=0), count) * (role_index >= 0)[..., None]).to(pattern.dtype)
    received = pattern.mean(1) @ keys  # (batch, query, role)
    at = [role_index == i for i in range(count)]
    return torch.stack([received[here].sum(0) / here.sum().clamp(min=1) for here in at])


def attention_along(
    link: Link, patterns: Mapping[str, Float[Tensor, "batch head query key"]], role_index: Int[Tensor, "batch pos"], roles: Sequence[str]
) -> Float[Tensor, "batch head"]:
    """Attention from the link's query to its key in every sequence; each of the two roles has exactly one position."""
    query, key = ((role_index == roles.index(role)).int().argmax(1) for role in (link.query, link.key))
    pattern = patterns[link.pattern]
    return pattern[torch.arange(len(pattern), device=pattern.device), :, query, key]


@torch.no_grad()
def attention_patterns(
    decomposition: Decomposition, batch: Batch, plans: Sequence[Plan], names: Sequence[str]
) -> dict[str, Float[Tensor, "batch head query key"]]:
    """The attention patterns of a masked run, by module name; an empty plan is the target itself."""
    with captured(decomposition.model, names) as seen:
        decomposition(batch.inputs, plans)
    return seen


@contextmanager
def captured(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yields a dictionary that receives the outputs of the modules `names` while the context is active."""
    seen: dict[str, Tensor] = {}
    with hooked([(model.get_submodule(name), partial(_keep, seen, name)) for name in names]):
        yield seen


def _keep(seen: dict[str, Tensor], name: str, _module: nn.Module, _args: object, _kwargs: object, pattern: Tensor) -> None:
    seen[name] = pattern.clone()  # the model may write to it later
