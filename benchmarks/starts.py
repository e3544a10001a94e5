"""Where U and V start, on two small models whose C is below, at and above the rank of their weights: the table in docs/choosing.md.

    python benchmarks/starts.py       36 runs of 300 steps, a few minutes of one core; the table, in Markdown

Both targets are trained first: an MLP that maps a token to another one (weights 12 × 24 and 24 × 16), and one head of attention that
copies the token before (weights 16 × 16 and 16 × 12). Evaluated on held-out batches; seeds 0 and 1.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paramlens import circuit, decompose

LOSSES = {"stochastic_recon": 1.0, "stochastic_recon_layerwise": 1.0, "recon": 0.5, "faithfulness": 1000.0, "minimality": 0.02}


class Mlp(nn.Module):
    """Two layers around a GELU."""

    length, vocabulary, rank, sites = 4, 16, 12, ("up", "down")

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(16, 12), nn.Linear(12, 24, bias=False), nn.Linear(24, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.embed(ids))))


class Attention(nn.Module):
    """One head, causal."""

    length, vocabulary, rank, sites = 8, 12, 16, ("q", "k", "v", "o")

    def __init__(self) -> None:
        super().__init__()
        d = 16
        self.embed, self.positions = nn.Embedding(12, d), nn.Parameter(torch.randn(8, d) * 0.5)
        self.q, self.k, self.v = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.o = nn.Linear(d, 12)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        later = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
        scores = (self.q(x) @ self.k(x).mT / 4).masked_fill(later, -1e9).softmax(-1)
        return self.o(scores @ self.v(x))


def tokens(step: int, model: Mlp | Attention, stream: int = 0) -> Tensor:
    """32 sequences."""
    rng = torch.Generator().manual_seed(step * 7919 + stream)
    return torch.randint(model.vocabulary, (32, model.length), generator=rng)


def trained(kind: type[Mlp | Attention]) -> Mlp | Attention:
    torch.manual_seed(0)
    model, mapped = kind(), torch.randperm(16)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(800):
        ids = tokens(step, model)
        logits = model(ids)
        said, expected = (logits, mapped[ids]) if isinstance(model, Mlp) else (logits[:, 1:], ids[:, :-1])
        loss = F.cross_entropy(said.flatten(0, 1), expected.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def main() -> None:
    print("| model | C | start | recon | rounded | stochastic | left out | active | unique |\n|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for kind in (Mlp, Attention):
        model = trained(kind)
        for C in (model.rank // 2, model.rank, 2 * model.rank):
            for start in ("random", "svd", "svd_rotated"):
                print(f"| {kind.__name__} | {C} | {start} | {_row(model, C, start)} |", flush=True)


def _row(model: Mlp | Attention, C: int, start: str) -> str:
    rows: list[tuple[float, ...]] = []
    for seed in (0, 1):
        run = decompose(
            model,
            lambda step: tokens(step + 10**6, model),
            held_out=lambda step: tokens(step + 2 * 10**6, model, 5),
            sites=model.sites,
            C=C,
            steps=300,
            seed=seed,
            init={"kind": start},
            gamma={"kind": "vector", "d_gate": 8},
            optim={"lr": 3e-3},
            losses=LOSSES,
            threads=1,
        )
        found = circuit(run, batches=4, adversary=0)
        active, unique = sum(site.active["all"] for site in found.sites.values()), sum(site.unique for site in found.sites.values())
        losses = (found.metrics[name] for name in ("recon", "recon_rounded", "stochastic_recon", "faithfulness_relative"))
        rows.append((*losses, active, unique))
    formats = (".3f", ".3f", ".3f", ".0e", ".0f", ".0f")
    return " | ".join(", ".join(f"{row[i]:{form}}" for row in rows) for i, form in enumerate(formats))


if __name__ == "__main__":
    main()
