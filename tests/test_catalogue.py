"""What the page is made of beyond the circuit: every active part, the edges between sites, the effect off the data."""

import json

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from paramlens.analysis.catalogue import catalogue
from paramlens.analysis.circuit import circuit
from paramlens.analysis.components import inspect_subcomponent, shown_sequences
from paramlens.analysis.edges import edges
from paramlens.analysis.held_out import held_out
from paramlens.analysis.off_data import off_data
from paramlens.errors import ConfigError
from paramlens.method.decomposition import call
from paramlens.method.losses.divergence import LossAt
from paramlens.method.masks import Replacement, rounded_mask
from paramlens.runs.decompose import decompose
from paramlens.runs.rundir import open_run
from rounding import TOY, assert_near, near, near_divergence


def test_catalogue_holds_what_is_active_somewhere(tiny_run):
    found = catalogue(tiny_run, threshold=0.3, batches=2)
    data = held_out(tiny_run, batches=2)
    shown = shown_sequences(tiny_run)
    for site, each in found.sites.items():
        g = torch.cat([held.g[site].flatten(0, -2) for held in data])
        highest = torch.maximum(g.amax(0), shown.g[site].flatten(0, -2).amax(0))
        assert {part.what.subcomponent for part in each.parts} == set((highest > 0.3).nonzero()[:, 0].tolist())
        assert [part.mean for part in each.parts] == sorted((part.mean for part in each.parts), reverse=True)
        for part in each.parts:
            assert part.mean == near(g[:, part.what.subcomponent].mean().item(), len(g))
            assert part.highest == near(highest[part.what.subcomponent].item(), TOY)
        assert_near(torch.tensor(each.importance), shown.g[site].sum(-1), TOY)
    assert found.positions == 2 * 4 * 8
    document = json.loads(json.dumps(found.to_json()))
    assert "tokens" not in document["sites"]["blocks.0.attn.q"]["parts"][0]
    with pytest.raises(ConfigError, match="threshold 1"):
        catalogue(tiny_run, threshold=1.0)


@torch.no_grad()
def test_removed_is_the_divergence_without_the_part(tiny_run):
    found = catalogue(tiny_run, batches=1)
    [held] = held_out(tiny_run, batches=1)
    decomposition, site = tiny_run.decomposition, "blocks.0.attn.v"
    part = found.sites[site].parts[0]
    c = part.what.subcomponent
    at = LossAt(last_token_only=True)
    log_probs = at.log_probs(call(decomposition.model, held.batch.inputs))
    masks = torch.ones_like(held.g[site])
    masks[..., c] = 0
    for expected, plan in (
        (part.removed, {site: Replacement(masks)}),
        (part.removed_masked, {**held.masked, site: Replacement(held.g[site] * masks)}),
        (found.masked, held.masked),
    ):
        logits = decomposition(held.batch.inputs, [plan])
        assert expected == near_divergence(at.divergence(log_probs, logits).item(), log_probs)


def test_an_induction_part_reads_embeddings_and_writes_through_the_output_projection(tiny_run):
    model, U, V = tiny_run.decomposition.model, tiny_run.decomposition.U, tiny_run.decomposition.V
    q = inspect_subcomponent(tiny_run, "blocks.0.attn.q", 1)
    read = model.embed.weight @ U["blocks.0.attn.q"][:, 1]
    names = [*map(str, range(6)), "s"]
    assert q.reads[0].what == names[read.abs().argmax()]
    assert q.reads[0].value == near(read[read.abs().argmax()].item(), 4)
    assert q.positions[0].what == str((model.positions @ U["blocks.0.attn.q"][:, 1]).abs().argmax().item())
    assert not q.writes
    v = inspect_subcomponent(tiny_run, "blocks.1.attn.v", 2)
    logits = model.unembed.weight @ (model.blocks[1].attn.o.weight @ V["blocks.1.attn.v"][2])
    assert v.writes[0].what == names[logits.argmax()]
    assert v.writes[0].value == near(logits.max().item(), 8)
    assert not v.positions
    assert v.tokens[0][-1] == "s"
    assert len(v.importance[0]) == len(v.tokens[0]) == 8


@torch.no_grad()
def test_edges_are_what_later_sites_lose(tiny_run):
    found = edges(tiny_run, threshold=0.2, batches=1)
    pairs = {(edge.source, edge.target): edge for edge in found.edges}
    assert all(int(source[7]) < int(target[7]) for source, target in pairs), "nothing reaches back, nor across one attention"
    [held] = held_out(tiny_run, batches=1)
    source, target = "blocks.0.attn.v", "blocks.1.attn.k"
    active = {site: rounded_mask(g, threshold=0.2) for site, g in held.g.items()}
    U, V = tiny_run.decomposition.U, tiny_run.decomposition.V
    model = tiny_run.decomposition.model
    before = tiny_run.decomposition.target_run(held.batch.inputs).inputs
    rest = ((before[source] @ U[source]) * (1 - active[source])) @ V[source]
    hook = model.blocks[0].attn.v.register_forward_hook(lambda module, args, output: rest)
    after = tiny_run.decomposition.target_run(held.batch.inputs).inputs
    hook.remove()
    a, b = ((given[target] @ U[target]) * active[target] for given in (before, after))
    assert pairs[source, target].inner == near(((a - b).abs().sum() / a.abs().sum()).item(), TOY + a.numel(), size=1)
    assert pairs[source, target].importance <= 1


def test_off_the_data_tokens_are_shuffled_or_facts_are_others(tiny_run, facts_run):
    found = off_data(tiny_run, held_out(tiny_run, batches=1), threshold=0.1)
    assert found is not None
    assert found.what == "held-out sequences with their tokens shuffled"
    assert found.sequences == 4
    other = circuit(facts_run, adversary=0).off_data
    assert other is not None
    assert other.what == "64 other facts"
    assert set(other.controls) == {"random directions", "largest singular directions"}
    assert min(other.recon, other.removed, *other.controls.values()) >= 0


def test_a_model_without_positions_shows_its_inputs(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    batches = [torch.randn(5, 6) for _ in range(3)]
    decompose(model, batches, sites=["0", "2"], C=4, steps=3, gamma={"kind": "vector"}, init={"kind": "svd"}, out=tmp_path / "run")
    run = open_run(tmp_path / "run", model=model, batches=batches)
    found = catalogue(run, threshold=0.0, batches=1)
    assert found.tokens == [[f"input {i}" for i in range(5)]]
    assert found.roles is None
    assert off_data(run, held_out(run, batches=1), threshold=0.1) is None
    assert all(len(part.what.inner[0]) == 5 for site in found.sites.values() for part in site.parts)


def test_a_model_of_images_has_a_catalogue(tmp_path):
    """Its input embeddings are patches, which are no tokens to read."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1))
    images = [torch.randn(3, 1, 8, 8)]
    fields = {"sites": ["vit.layers.*.mlp.*"], "C": 3, "steps": 2, "gamma": {"kind": "vector", "d_gate": 2}}
    found = catalogue(decompose(model, images, out=tmp_path / "run", **fields), threshold=0.0, batches=1)
    parts = [part for site in found.sites.values() for part in site.parts]
    assert parts
    assert all(part.what.reads == [] for part in parts)
