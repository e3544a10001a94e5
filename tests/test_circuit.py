import dataclasses
import json

import pytest
import torch
from torch import nn

from paramlens.analysis.attention import attention_divergence, attention_patterns
from paramlens.analysis.circuit import circuit, silence
from paramlens.analysis.held_out import held_out
from paramlens.errors import ConfigError
from paramlens.method.evaluate import evaluate, importances
from paramlens.method.masks import Replacement
from paramlens.runs import train
from paramlens.runs.decompose import decompose
from paramlens.runs.rundir import open_run
from paramlens.tasks.induction.sequences import S1
from rounding import TOY, bound, near, near_divergence


def test_counts_by_hand(tiny_run, monkeypatch: pytest.MonkeyPatch):
    """Importances set by hand: subcomponents 0 and 1 on at s1, 2 at half the others, all else off."""

    def by_hand(decomposition, importance, batch):
        target, g = importances(decomposition, importance, batch)
        made = torch.zeros_like(g["blocks.0.attn.q"])
        made[batch.roles == S1] = torch.tensor([0.9, 0.2, 0.0, 0.0, 0.05])
        return target, {name: made if name == "blocks.0.attn.q" else torch.zeros_like(made) for name in g}

    monkeypatch.setattr("paramlens.analysis.held_out.importances", by_hand)
    result = circuit(tiny_run, batches=2)
    site = result.sites["blocks.0.attn.q"]
    assert site.active == {"s1": 2.0, "m": 0.0, "s2": 0.0, "random": 0.0}
    assert site.importance["s1"] == near(1.15, 5 + 8)
    assert site.subcomponents["s1"] == near([0.9, 0.2, 0.0, 0.0, 0.05], 8)
    assert (site.unique, site.silent) == (2, None)
    assert circuit(tiny_run, batches=2, threshold=0.01).sites["blocks.0.attn.q"].unique == 3
    key = result.sites["blocks.0.attn.k"]
    assert key.unique == 0
    assert key.silent.startswith(
        "has no subcomponent above 0.1 anywhere; with all of them off it writes zero, so every attention score is the"
    )
    assert key.silent.endswith("attention is uniform over what it may see, not off")
    assert result.sites["blocks.0.attn.v"].silent.endswith("writes zero, and the rest of the model runs without what this site contributes")


@pytest.mark.parametrize(("site", "has_bias", "added_after"), [("h.mlp", False, False), ("h.q", True, False), ("h.k", False, True)])
def test_silence_claims_uniform_attention_only_where_it_holds(site: str, has_bias: bool, added_after: bool):
    assert "uniform" not in silence(site, has_bias=has_bias, threshold=0.1, added_after=added_after)
    assert "uniform" in silence("h.q", has_bias=False, threshold=0.1, added_after=False)


def test_circuit_json(tiny_run):
    document = json.loads(json.dumps(circuit(tiny_run, batches=1).to_json()))
    site = document["sites"]["blocks.1.attn.v"]
    assert set(site["active"]) == {"s1", "m", "s2", "random"}
    assert 0 <= site["unique"] <= 5
    assert set(document["metrics"]) == {
        *("faithfulness", "faithfulness_relative", "recon", "recon_layerwise", "stochastic_recon", "recon_rounded"),
        *("accuracy_target", "accuracy_masked", "attention_kl", "attention_kl_all", "recon_adversarial", "recon_worst"),
    }
    assert len(document["example"]["attention"]["blocks.0.attn.pattern"]["masked"]) == 8
    assert len(document["example"]["tokens"]) == len(document["example"]["roles"]) == 8
    assert document["sequences"] == 4


def test_metrics_of_a_perfect_decomposition(tiny_run):
    """All importances 1 and U V = W: nothing is lost, in logits or in attention."""
    decomposition, task = tiny_run.decomposition, tiny_run.task
    batch = task.batch(0, "circuit")
    saved = {name: (decomposition.U[name].clone(), decomposition.V[name].clone()) for name in decomposition.names}
    with torch.no_grad():
        for site in decomposition.sites:
            decomposition.U[site.name].copy_(torch.eye(4, 5))
            decomposition.V[site.name].copy_(torch.eye(5, 4) @ site.W)
        target, g = importances(decomposition, tiny_run.importance, batch)
        ones = {name: torch.ones_like(value) for name, value in g.items()}
        metrics = evaluate(task, decomposition, batch, target, ones, last_token_only=True)
        plans = [{}, *({site: Replacement(factor * value) for site, value in ones.items()} for factor in (1, 0.5))]
        target_patterns, masked, halved = (attention_patterns(decomposition, batch, [plan], task.attention_patterns) for plan in plans)
        divergence = {name: attention_divergence(pattern, masked[name]) for name, pattern in target_patterns.items()}
        halves = {name: attention_divergence(pattern, halved[name]) for name, pattern in target_patterns.items()}
        for name, (U, V) in saved.items():
            decomposition.U[name].copy_(U)
            decomposition.V[name].copy_(V)
    for name in ("faithfulness", "recon", "recon_layerwise", "stochastic_recon", "recon_rounded"):
        assert metrics[name] == near_divergence(0, target.logits)
    assert metrics["accuracy_masked"] == metrics["accuracy_target"]
    largest = max(-pattern.clamp(min=1e-30).log().min().item() for pattern in target_patterns.values())
    assert all(value.abs().max() < bound(TOY, largest) < halves[name].max() for name, value in divergence.items())
    zeros = {name: torch.zeros_like(value) for name, value in g.items()}
    scores = evaluate(task, decomposition, batch, target, zeros, last_token_only=True)
    assert scores["recon_rounded"] == near_divergence(scores["recon"], target.logits)
    assert scores["recon"] > metrics["recon"]
    assert divergence["blocks.0.attn.pattern"].shape == (4, 8)


def test_attention_divergence_is_a_mean_over_queries(tiny_run):
    result = circuit(tiny_run, batches=2)
    blocks = result.attention_kl
    assert result.metrics["attention_kl_all"] == near(sum(block["all"] for block in blocks.values()) / 2, 64)
    linked = blocks["blocks.0.attn.pattern"]["m"] + blocks["blocks.1.attn.pattern"]["s2"]
    assert result.metrics["attention_kl"] == near(linked / 2, 64)
    block = blocks["blocks.0.attn.pattern"]
    weights = {"s1": 1, "m": 1, "s2": 1, "random": 5}
    assert block["all"] == near(sum(weights[role] * block[role] for role in weights) / 8, 64)


def decompose_flat() -> list[str]:
    """The same for inputs without a position axis."""
    fields = {"C": 2, "steps": 1, "gamma": {"kind": "vector", "d_gate": 2}}
    return circuit(decompose(nn.Sequential(nn.Linear(3, 2)), [torch.randn(5, 3)], **fields), batches=1).example.roles


def test_circuit_of_your_own_model(tmp_path):
    """One role, no attention, no answers; and a clear word where there is no data to look at."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [torch.randn(5, 6, 3)]
    fields = {"C": 4, "steps": 3, "gamma": {"kind": "vector", "d_gate": 2}}
    run = decompose(model, batches, out=tmp_path / "run", **fields)
    result = circuit(run, batches=2)
    assert result.roles == ["all"]
    assert set(result.sites["0"].active) == {"all"}
    assert (result.attention_kl, "accuracy_masked" in result.metrics) == ({}, False)
    opened = circuit(open_run(run.path, model=model, batches=batches), batches=2)
    assert (result.evaluated_on, opened.evaluated_on) == ("training", "given")
    assert dataclasses.replace(opened, evaluated_on="training") == result
    assert decompose_flat() == ["all"]
    with pytest.raises(ConfigError, match=r"no data to look at; open_run\(path, model=..., batches=...\)"):
        circuit(open_run(run.path, model=model))


class Embedded(nn.Module):
    """Tokens to logits; with `vocabularies` every place has one of its own."""

    def __init__(self, *vocabularies: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(count, 4) for count in vocabularies)
        self.up = nn.Linear(4, 5)

    def forward(self, ids):
        each = [self.tables[i % len(self.tables)](ids[:, i]) for i in range(ids.shape[1])]
        return self.up(torch.stack(each, 1))


SMALL = {"sites": ["up"], "C": 3, "steps": 2, "gamma": {"kind": "vector", "d_gate": 2}}


def test_batches_of_several_lengths_have_a_circuit(tmp_path):
    torch.manual_seed(0)
    run = decompose(Embedded(6), [torch.randint(6, (4, 5)), torch.randint(6, (2, 3))], out=tmp_path / "run", **SMALL)
    result = circuit(run, batches=2)
    counts = [(held.g["up"] > 0.1).sum(-1).flatten().double() for held in held_out(run, batches=2)]
    assert result.sequences == 6
    assert result.sites["up"].active["all"] == near(torch.cat(counts).mean().item(), 26)


def test_a_model_that_refuses_shuffled_tokens_has_nothing_off_its_data(tmp_path):
    torch.manual_seed(0)
    ids = torch.stack([torch.randint(2, (8,)), torch.randint(50, 90, (8,))], 1)
    assert circuit(decompose(Embedded(2, 90), [ids], out=tmp_path / "run", **SMALL), batches=1).off_data is None


def test_the_one_role_of_a_model_of_ones_own_is_no_place_to_look_around(tmp_path):
    torch.manual_seed(0)
    run = decompose(Embedded(6), [torch.randint(6, (4, 1))], out=tmp_path / "run", **SMALL)
    assert circuit(run, batches=1).maps == {}


def test_every_batch_has_masks_of_its_own(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Two equal batches are given other random masks each, by the trainer and by the circuit: their mean is of two draws."""
    torch.manual_seed(0)
    run = decompose(Embedded(6), lambda _: torch.tensor([[1, 2, 3]]), out=tmp_path / "run", **SMALL)
    config = run.config.model_copy(update={"evaluate": run.config.evaluate.model_copy(update={"batches": 2})})
    rows = []
    for module in ("paramlens.runs.train", "paramlens.analysis.circuit"):
        monkeypatch.setattr(f"{module}.evaluate", lambda *args, **how: rows.append(evaluate(*args, **how)) or rows[-1])
    train.held_out(config, run.task, run.decomposition, run.importance)
    circuit(run, batches=2, adversary=0)
    assert [row["recon"] for row in rows] == pytest.approx([rows[0]["recon"]] * 4)
    assert rows[0]["stochastic_recon"] != rows[1]["stochastic_recon"]
    assert rows[2]["stochastic_recon"] != rows[3]["stochastic_recon"]
