"""γ's attention on CUDA for long sequences: PyTorch's flex attention, which never stores the (pos, pos) scores."""

from functools import cache
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FLEX_LENGTH = 1024
"""Minimum number of positions for which γ's attention on CUDA runs as flex attention."""


def flex_by_offset(
    q: Float[Tensor, "site batch pos d"],
    k: Float[Tensor, "site batch pos d"],
    v: Float[Tensor, "site batch pos d"],
    relative: Float[Tensor, "site offset"],
    present: Bool[Tensor, "batch pos"] | None = None,
    *,
    compiled: bool,
) -> Float[Tensor, "site batch pos d"]:
    """softmax((q k^T + r) / sqrt(d)) v over the present keys; r is one number per offset (key - query). Sites are passed as heads."""
    from torch.nn.attention.flex_attention import flex_attention

    half, root = relative.shape[-1] // 2, q.shape[-1] ** 0.5

    def add_relative(score: Tensor, batch: Tensor, site: Tensor, query: Tensor, key: Tensor) -> Tensor:
        score = score + relative[site, (key - query + half).clamp(1, 2 * half - 1)] / root
        return score if present is None else torch.where(present[batch, key], score, -torch.inf)

    function = _compiled_flex() if compiled else flex_attention
    return cast("Tensor", function(*(t.transpose(0, 1) for t in (q, k, v)), score_mod=add_relative)).transpose(0, 1)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
