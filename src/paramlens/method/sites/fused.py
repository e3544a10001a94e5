"""Fused projections: one weight that computes queries, keys and values, and the columns that belong to each.

The order of the columns differs between models, so it depends on the class of the attention module that owns the weight. Each run checks
it on the first batch (`paramlens.method.entry`) and stops with an error if it is wrong.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

PARTS = ("q", "k", "v")
"""Slices of a fused projection."""

_Layout = tuple[int, tuple[tuple[str, int], ...]]
"""How often a pattern repeats along the columns, and the pattern: slice (q, k or v) and number of columns, in order."""


def fused_columns(model: nn.Module, name: str, *, d_in: int, width: int) -> dict[str, Int[Tensor, "column"]] | None:
    """Slice → its columns of the output of the module `name`. None: no layout is known, or the known one does not fit."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    known = _LAYOUTS.get((type(owner).__name__, leaf))
    if known is not None:
        layout = known(owner, width)
    elif leaf == "c_attn" and width == 3 * d_in:
        layout = _thirds(owner, width)
    else:
        return None
    repeats, parts = layout
    if repeats < 1 or repeats * sum(size for _, size in parts) != width or min(size for _, size in parts) < 1:
        return None
    split = torch.arange(width).view(repeats, -1).split([size for _, size in parts], dim=1)
    columns = {part: each.flatten() for (part, _), each in zip(parts, split, strict=True)}
    return {part: columns[part] for part in PARTS}


def _thirds(_owner: Any, width: int) -> _Layout:
    return 1, tuple((part, width // 3) for part in PARTS)


def _head_by_head(owner: Any, width: int) -> _Layout:
    size = owner.head_size if hasattr(owner, "head_size") else owner.head_dim
    return width // (3 * size), tuple((part, size) for part in PARTS)


def _grouped(owner: Any, width: int) -> _Layout:
    """All queries, then all keys, then all values; keys and values can have fewer heads."""
    shared = owner.num_key_value_heads * owner.head_dim
    return 1, (("q", width - 2 * shared), ("k", shared), ("v", shared))


def _bigcode(owner: Any, width: int) -> _Layout:
    if not owner.multi_query:
        return _head_by_head(owner, width)
    return 1, (("q", width - 2 * owner.head_dim), ("k", owner.head_dim), ("v", owner.head_dim))


def _falcon(owner: Any, width: int) -> _Layout:
    """Groups of query heads, each followed by the key head and the value head that it shares."""
    size = owner.head_dim
    groups = owner.num_kv_heads if owner.new_decoder_architecture else 1 if owner.multi_query else owner.num_heads
    return groups, (("q", width // groups - 2 * size), ("k", size), ("v", size))


def _codegen(_owner: Any, width: int) -> _Layout:
    """Four groups of heads, each with queries, values, keys in this order."""
    return 4, tuple((part, width // 12) for part in "qvk")


_LAYOUTS: dict[tuple[str, str], Callable[[Any, int], _Layout]] = {
    ("GPTNeoXAttention", "query_key_value"): _head_by_head,
    ("GPTNeoXJapaneseAttention", "query_key_value"): _head_by_head,
    ("BloomAttention", "query_key_value"): _head_by_head,
    ("PersimmonAttention", "query_key_value"): _head_by_head,
    ("FalconAttention", "query_key_value"): _falcon,
    ("FalconFlashAttention2", "query_key_value"): _falcon,
    ("GPTBigCodeAttention", "c_attn"): _bigcode,
    ("MiniMaxLightningAttention", "qkv_proj"): _head_by_head,
    ("CodeGenAttention", "qkv_proj"): _codegen,
    ("Phi3Attention", "qkv_proj"): _grouped,
    ("Phi4MultimodalAttention", "qkv_proj"): _grouped,
    ("DbrxAttention", "Wqkv"): _grouped,
    ("MptAttention", "Wqkv"): _thirds,
    ("ModernBertAttention", "Wqkv"): _thirds,
    ("BarkSelfAttention", "att_proj"): _thirds,
}
"""(class of the owner, name of the weight in it) → layout, as the forward of that class splits the columns."""
