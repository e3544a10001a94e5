"""The method transcribed from the paper the slow, obvious way: loops over sites and subcomponents, one forward pass per plan.

Nothing here uses the library's arithmetic; tests hold the library to it, values and gradients.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def lower(pre: Tensor) -> Tensor:
    """clamp(pre, 0, 1); gradient 1 in (0, 1], 0 above, and at or below 0 leaking 0.01 where descent would raise pre."""

    class LeakyBelow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clamp(0, 1)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            out = torch.zeros_like(grad)
            for index in range(x.numel()):
                value, slope = x.flatten()[index].item(), grad.flatten()[index]
                if 0 < value <= 1:
                    out.view(-1)[index] = slope
                elif value <= 0 and slope < 0:
                    out.view(-1)[index] = 0.01 * slope
            return out

    return LeakyBelow.apply(pre)


def upper(pre: Tensor) -> Tensor:
    """1 + 0.01 (pre - 1) above 1, clamp elsewhere, ordinary gradient (0 at the kink at 0)."""
    return torch.where(pre > 1, 1 + 0.01 * (pre - 1), torch.where(pre > 0, pre, torch.zeros_like(pre)))


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def mlp(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    """One subcomponent's MLP: x (..., width) → (...)."""
    return gelu(x @ w_in + b_in) @ w_out + b_out


def gamma(kind: str, relative: str, x: Tensor, U: Tensor, parameters: dict[str, Tensor], max_length: int | None) -> Tensor:
    """Pre-activations of one site, a loop over subcomponents. x (batch, pos, d_in) → (batch, pos, C)."""
    C = U.shape[1]
    p = parameters
    if kind == "shared":
        return gelu(x @ p["w_in"] + p["b_in"]) @ p["w_out"] + p["b_out"]
    if kind.startswith("attention"):
        seen = attend(x, p, relative, max_length)
    if kind == "attention_shared":
        return gelu(seen @ p["w_in"] + p["b_in"]) @ p["w_out"] + p["b_out"]
    columns = []
    for c in range(C):
        if kind == "scalar":
            read = (x @ U[:, c])[..., None]
        elif kind == "vector":
            read = x
        else:
            read = seen
        columns.append(mlp(read, p["w_in"][c], p["b_in"][c], p["w_out"][c], p["b_out"][c]))
    return torch.stack(columns, dim=-1)


def attend(x: Tensor, p: dict[str, Tensor], relative: str, max_length: int) -> Tensor:
    """Algorithm 1, lines 1 to 5, one query at a time."""
    batch, n, d = x.shape
    x_pos = x + p["absolute"][:n]
    q, k, v = x @ p["query"], x @ p["key"], x_pos @ p["value"]
    sequences = []
    for b in range(batch):
        rows = []
        for i in range(n):
            scores = []
            for j in range(n):
                entry = p["relative"][j - i + max_length]
                r = entry if relative == "offset" else q[b, i] @ entry
                scores.append((q[b, i] @ k[b, j] + r) / math.sqrt(d))
            weights = torch.stack(scores).softmax(0)
            rows.append(weights @ v[b])
        sequences.append(torch.stack(rows))
    return torch.cat([torch.stack(sequences), x_pos], dim=-1)


def transformer(
    inputs: dict[str, Tensor], trunk: dict[str, Tensor], sites: dict[str, dict[str, Tensor]], heads: int, present: Tensor | None = None
) -> dict[str, Tensor]:
    """Pre-activations of all sites, one sequence and one query at a time. inputs: site → (batch, pos, d_in); → (batch, pos, C)."""
    batch, n = next(iter(inputs.values())).shape[:2]
    answers: dict[str, list[Tensor]] = {name: [] for name in inputs}
    for b in range(batch):
        keys = [i for i in range(n) if present is None or present[b, i]]
        stream = [torch.cat([normed(inputs[name][b, i]) for name in inputs]) @ trunk["w_in"] for i in range(n)]
        for layer in range(len(trunk["up"])):
            own = {name: value[layer] for name, value in trunk.items() if name != "w_in"}
            triples = [(normed(x) @ own["attend"]).chunk(3) for x in stream]
            for i in range(n):
                mixed = []
                for h in range(heads):
                    q, k, v = zip(*([part.chunk(heads)[h] for part in triple] for triple in triples), strict=True)
                    scores = torch.stack([turned(q[i], i) @ turned(k[j], j) / math.sqrt(len(q[i])) for j in keys])
                    mixed.append(sum(weight * v[j] for weight, j in zip(scores.softmax(0), keys, strict=True)))
                stream[i] = stream[i] + torch.cat(mixed) @ own["attended"]
            stream = [x + mlp(normed(x), own["up"], own["b_up"], own["down"], own["b_down"]) for x in stream]
        for name, p in sites.items():
            answers[name].append(torch.stack([normed(x) @ p["w_out"] + p["b_out"] for x in stream]))
    return {name: torch.stack(rows) for name, rows in answers.items()}


def normed(x: Tensor) -> Tensor:
    return x / torch.sqrt(sum(entry**2 for entry in x) / len(x) + 1e-6)


def turned(x: Tensor, place: int) -> Tensor:
    """The rotary encoding: the pair of entries i and i + half is turned by place / 10000^(i / half)."""
    half = len(x) // 2
    angles = [place / 10000 ** (i / half) for i in range(half)]
    first = [x[i] * math.cos(a) - x[i + half] * math.sin(a) for i, a in enumerate(angles)]
    second = [x[i + half] * math.cos(a) + x[i] * math.sin(a) for i, a in enumerate(angles)]
    return torch.stack(first + second)


def masked_site(
    x: Tensor, U: Tensor, V: Tensor, mask: Tensor, bias: Tensor | None, remainder: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Σ_c mask_c (x · U_c) V_c + bias; remainder: W and m_Δ, for m_Δ x (W - Σ_c U_c V_c) in addition."""
    out = torch.zeros(*x.shape[:-1], V.shape[1], dtype=x.dtype)
    for c in range(U.shape[1]):
        out = out + mask[..., c, None] * (x @ U[:, c])[..., None] * V[c]
    if remainder is not None:
        W, m = remainder
        out = out + m[..., None] * (x @ (W - sum(torch.outer(U[:, c], V[c]) for c in range(U.shape[1]))))
    return out if bias is None else out + bias


def kl(target_logits: Tensor, logits: Tensor, last_token_only: bool) -> Tensor:
    """Σ p (log p - log q), mean over loss positions."""
    if last_token_only:
        target_logits, logits = target_logits[:, -1], logits[:, -1]
    log_p, log_q = target_logits.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def reconstruction(
    run: Callable[[dict[str, Tensor]], Tensor], target_logits: Tensor, plans: list[dict[str, Tensor]], last_token_only: bool
) -> Tensor:
    """Mean divergence over plans, one forward pass each; `run` maps {site: mask} to logits."""
    return torch.stack([kl(target_logits, run(plan), last_token_only) for plan in plans]).mean()


def faithfulness(W: dict[str, Tensor], U: dict[str, Tensor], V: dict[str, Tensor]) -> Tensor:
    """eq. 1: the sum over c of outer products, entry by entry against W."""
    total, entries = torch.zeros((), dtype=torch.float64), 0
    for site in W:
        summed = sum(torch.outer(U[site][:, c], V[site][c]) for c in range(U[site].shape[1]))
        total = total + ((W[site] - summed) ** 2).sum()
        entries += W[site].numel()
    return total / entries


def minimality(pre: dict[str, Tensor], p: float, eps: float) -> Tensor:
    """eq. 1: Σ_l Σ_c (g + ε)^p - ε^p, mean over batch and positions."""
    total = torch.zeros((), dtype=torch.float64)
    for value in pre.values():
        for c in range(value.shape[-1]):
            total = total + ((upper(value[..., c]) + eps) ** p - eps**p).mean()
    return total


def smooth_minimality(pre: dict[str, Tensor], width: float, weight: float, scale: float) -> Tensor:
    """Σ_l Σ_c f (1 + b log2(1 + a f)), f the mean over batch and positions of g² / (g² + γ²)."""
    total = torch.zeros((), dtype=torch.float64)
    for value in pre.values():
        for c in range(value.shape[-1]):
            g = upper(value[..., c])
            f = (g**2 / (g**2 + width**2)).mean()
            total = total + f * (1 + weight * torch.log(1 + scale * f) / torch.log(torch.tensor(2.0, dtype=torch.float64)))
    return total
