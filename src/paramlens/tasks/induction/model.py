"""The target of the induction task: an attention-only Transformer (§5.1, Table 3)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paramlens.tasks.induction.task import InductionTask


class Attention(nn.Module):
    """Causal attention with position encodings in queries and keys but not in values ("Shortformer").

    The attention pattern is computed only if `pattern` has a hook. Otherwise PyTorch's fused attention computes the same output.
    """

    def __init__(self, width: int, *, heads: int, added: str) -> None:
        super().__init__()
        self.heads, self.added = heads, added
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.pattern = nn.Identity()

    def forward(self, x: Tensor, positions: Tensor, *, last_query_only: bool = False) -> Tensor:
        """What attention adds to the residual stream, (B, T or 1, d). x: (B, T, d). positions: (T, d)."""
        start = x.shape[1] - 1 if last_query_only else 0
        if self.added == "before":
            q, k = self.q((x + positions)[:, start:]), self.k(x + positions)
        else:
            q, k = self.q(x[:, start:]) + positions[start:], self.k(x) + positions
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, self.v(x)))  # (B, H, T, d_head)
        if self.pattern._forward_hooks:
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
            future = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype, device=x.device).triu(1)[start:]
            seen = self.pattern((scores + future).softmax(-1)) @ v  # the pattern is (B, H, T, T); its rows sum to 1
        else:
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=not start)
        return self.o(seen.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, *, heads: int, added: str) -> None:
        super().__init__()
        self.attn = Attention(width, heads=heads, added=added)

    def forward(self, x: Tensor, positions: Tensor, *, last_query_only: bool = False) -> Tensor:
        return (x[:, -1:] if last_query_only else x) + self.attn(x, positions, last_query_only=last_query_only)


class InductionTransformer(nn.Module):
    """Embedding, attention blocks and unembedding, without feed-forward layers, LayerNorm or biases (Table 3)."""

    def __init__(self, task: InductionTask) -> None:
        super().__init__()
        self.embed = nn.Embedding(task.vocabulary + 1, task.width)
        nn.init.normal_(self.embed.weight, std=task.embedding_scale)
        if task.positions == "learned":
            self.positions = nn.Parameter(torch.randn(task.length, task.width) * task.position_scale)
            if task.position_offset:
                self.positions.data += torch.randn(task.width) * task.position_offset
        else:
            self.register_buffer("positions", sinusoidal(task.length, task.width) * task.position_scale)
        self.blocks = nn.ModuleList(Block(task.width, heads=task.heads, added=task.added) for _ in range(task.blocks))
        self.unembed = nn.Linear(task.width, task.vocabulary + 1, bias=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def get_output_embeddings(self) -> nn.Linear:
        return self.unembed

    def position_encodings(self, site: str) -> Float[Tensor, "pos width"] | None:
        """The position encodings in the input of a site. None: the input has none (values, or encodings added after the projection)."""
        seen = self.blocks[0].get_submodule("attn").added == "before" and not site.endswith(".v")
        return self.positions if seen else None

    def forward(
        self, tokens: Int[Tensor, "batch pos"], *, offset: int = 0, last_token_only: bool = False
    ) -> Float[Tensor, "batch query token"]:
        """Logits at every position, or at the last one. offset: place in the position table where the sequence starts."""
        positions = self.positions[offset : offset + tokens.shape[1]]
        x = self.embed(tokens)
        for block in self.blocks[:-1]:
            x = block(x, positions)
        return self.unembed(self.blocks[-1](x, positions, last_query_only=last_token_only))


def sinusoidal(length: int, width: int) -> Float[Tensor, "pos width"]:
    """The fixed sinusoidal position encodings of Vaswani et al. (2017)."""
    angle = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]
