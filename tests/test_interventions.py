"""Interventions and maps, against the same numbers from the target and its weights directly."""

from itertools import pairwise

import pytest
import torch

from conftest import tiny_with
from paramlens.analysis.adversary import adversarial_recon, attack
from paramlens.analysis.attention import attention_along, attention_by_role
from paramlens.analysis.circuit import circuit
from paramlens.analysis.held_out import held_out
from paramlens.analysis.interventions import interventions
from paramlens.analysis.maps import aligned_importance
from paramlens.method.evaluate import importances
from paramlens.method.generators import generator
from paramlens.method.losses.divergence import LossAt, kl_divergence
from paramlens.method.masks import Replacement
from paramlens.method.task import Link
from paramlens.page import report
from paramlens.runs.decompose import decompose_config
from paramlens.runs.rundir import open_run
from paramlens.tasks.induction.model import InductionTransformer
from paramlens.tasks.induction.sequences import S1, M, induction_batch, induction_task
from paramlens.tasks.induction.task import InductionTask
from paramlens.tasks.induction.training import check_target
from rounding import TOY, TOY_STEP, assert_near, bound, near, near_divergence


def measured(run, threshold: float = 0.1) -> dict:
    data = held_out(run, batches=2)
    return {each.name: each for each in interventions(run.decomposition, run.task, data, threshold=threshold, last_token_only=True)}


def test_names_and_the_target_itself(tiny_run):
    changes = measured(tiny_run)
    sites = tiny_run.decomposition.names
    assert list(changes) == [
        *("target", "masked"),
        *(f"{site} {effect}" for effect in ("removed", "alone") for site in sites),
        *("no position in the query at m", "no position in the key at s1"),
    ]
    target = changes["target"]
    data = held_out(tiny_run, batches=2)
    logits = torch.cat([held.target.logits for held in data])
    assert target.kl == near_divergence(0, logits)
    right = [held.target.logits[:, -1].argmax(-1) == held.batch.answers for held in data]
    assert target.accuracy == torch.cat(right).double().mean().item()
    table = circuit(tiny_run, batches=2, adversary=0)
    assert changes["masked"].kl == near_divergence(table.metrics["recon"], logits)
    assert changes["masked"].accuracy == table.metrics["accuracy_masked"]


def test_all_removed_is_the_weight_that_is_left(tiny_run):
    """At a threshold below every g the whole sum is removed: the site is W - (W - U V) zeroed, so its output is 0 everywhere."""
    run, site = open_run(tiny_run.path), "blocks.1.attn.v"
    with torch.no_grad():
        for group in run.importance.typed_groups:
            group.b_out += 5
    removed = measured(run)[f"{site} removed"]
    weight = run.decomposition.model.get_submodule(site).weight
    kept = weight.detach().clone()
    values = []
    with torch.no_grad():
        weight.zero_()
        for index in range(2):
            batch = run.task.batch(index, "circuit")
            without = run.decomposition.model(batch.inputs)[:, -1:]
            weight.copy_(kept)
            values.append(kl_divergence(run.decomposition.model(batch.inputs)[:, -1:].log_softmax(-1), without[None]).item())
            weight.zero_()
        weight.copy_(kept)
    assert removed.kl == near_divergence(sum(values) / 2, without)


@pytest.mark.parametrize("added", ["before", "after"])
def test_position_is_missing_at_one_query_alone(added):
    """Attention as computed by hand with the query at m made from the embedding without its position."""
    settings = InductionTask(vocabulary=6, length=8, width=4, added=added)
    torch.manual_seed(0)
    model = InductionTransformer(settings)
    batch = induction_batch(settings, seed=0, stream="x", step=0, batch=5)
    attention, task = model.blocks[0].attn, induction_task(settings, model, seed=0, batch=5)
    seen = {}
    before = model(batch.inputs)
    hook = attention.pattern.register_forward_hook(lambda _m, _a, pattern: seen.update(pattern=pattern))
    model(batch.inputs)
    whole = seen["pattern"]
    with task.changes["no position in the query at m"](batch):
        model(batch.inputs)
    hook.remove()
    at = batch.roles == M
    assert torch.equal(seen["pattern"].transpose(1, 2)[~at], whole.transpose(1, 2)[~at])
    x = model.embed(batch.inputs)
    k = attention.k(x + model.positions) if added == "before" else attention.k(x) + model.positions
    scores = attention.q(x[at])[:, None] @ k.transpose(1, 2) / 2
    place = at.int().argmax(1)[:, None, None]
    by_hand = scores.masked_fill(torch.arange(8) > place, -torch.inf).softmax(-1)
    assert_near(seen["pattern"].transpose(1, 2)[at], by_hand, 4 + 4 + 8, size=1 + scores.abs().max().item())
    assert torch.equal(model(batch.inputs), before)


def test_links_are_what_the_target_check_measures(tiny_run):
    model, task = tiny_run.decomposition.model, tiny_run.config.task
    check = check_target(model, task, seed=0, step=0, batch=64)
    batch = induction_batch(task, seed=0, stream="target-check", step=0, batch=64)
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _m, _a, pattern, name=name: seen.update({name: pattern}))
        for name in tiny_run.task.attention_patterns
    ]
    model(batch.inputs)
    for hook in hooks:
        hook.remove()
    for link in tiny_run.task.links:
        mean = attention_along(link, seen, batch.roles, tiny_run.task.roles).mean(0).max().item()
        assert mean == near(getattr(check, link.name), TOY + 64)


def test_attention_by_role_by_hand():
    pattern = torch.tensor([[[[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]]])
    roles = torch.tensor([[0, 1, 1]])
    assert_near(attention_by_role(pattern, roles, 3), torch.tensor([[1.0, 0, 0], [0.35, 0.65, 0], [0, 0, 0]]), 4)
    link = Link("x", "p", "s2", "s1")
    assert attention_along(link, {"p": pattern}, torch.tensor([[0, 2, 1]]), ("s1", "s2", "rest")).tolist() == [[near(0.2, 4)]]


def test_maps_are_aligned_on_roles_that_stand_alone():
    roles = torch.tensor([[0, 1, 2, 2], [2, 0, 1, 2]])
    g = {"a": torch.zeros(2, 4, 2)}
    g["a"][roles == 1] = torch.tensor([0.25, 0.5])
    g["a"][1, 0, 0] = 0.5
    maps = aligned_importance(g, roles, ("s1", "m", "random"))
    assert list(maps) == ["s1", "m"]
    assert maps["s1"].offsets == [-1, 0, 1, 2, 3]
    assert maps["s1"].importance["a"] == [0.5, 0.0, 0.75, 0.0, 0.0]
    assert maps["m"].offsets == [-2, -1, 0, 1, 2]
    assert maps["m"].importance["a"] == [0.5, 0.0, 0.75, 0.0, 0.0]


def test_the_adversary_finds_what_random_masks_miss(tiny_run):
    """Its masks stay in [g, 1], more steps never find less, and it beats every one of twenty random draws."""
    run = tiny_run
    [held] = held_out(run, batches=1)
    decomposition, task = run.decomposition, run.task
    inputs = task.loss_inputs(held.batch, last_token_only=True)

    def found(steps: int) -> float:
        return adversarial_recon(
            decomposition, inputs, held.target, held.g, at=LossAt(last_token_only=True), generator=generator("test"), steps=steps
        )

    assert found(0) <= found(5) <= found(20)
    log_probs = held.target.logits[:, -1:].log_softmax(-1)
    rng = torch.Generator().manual_seed(0)
    random = []
    for _ in range(20):
        masked = {site: Replacement(g + (1 - g) * torch.rand(g.shape[-1], generator=rng)) for site, g in held.g.items()}
        with torch.no_grad():
            random.append(kl_divergence(log_probs, decomposition(inputs, [masked])).item())
    assert found(20) > max(random)
    ones = {site: torch.ones_like(g) for site, g in held.g.items()}
    whole = adversarial_recon(
        decomposition, inputs, held.target, ones, at=LossAt(last_token_only=True), generator=generator("test"), steps=5
    )
    with torch.no_grad():
        everything = decomposition(inputs, [{site: Replacement(g) for site, g in ones.items()}])
    assert whole == near_divergence(kl_divergence(log_probs, everything).item(), everything)


def test_s1_is_the_role_before_m():
    batch = induction_batch(InductionTask(vocabulary=6, length=8), seed=0, stream="x", step=0, batch=9)
    assert torch.equal((batch.roles == S1).int().argmax(1) + 1, (batch.roles == M).int().argmax(1))


def attacked(run, *, steps=(1, 2, 4, 8), starts=4, at_once=None, monkeypatch=None):
    task = run.task
    assert task is not None
    batch = task.batch(0, "evaluate")
    target, g = importances(run.decomposition, run.importance, batch)
    if at_once is not None:
        monkeypatch.setattr("paramlens.analysis.adversary.stack_size", lambda *_, **__: at_once)
    return attack(run.decomposition, batch.inputs, target, g, at=LossAt(), generator=generator("attack"), steps=steps, starts=starts), (
        batch,
        target,
        g,
    )


def test_an_attack_is_a_ladder_from_several_starts(tiny_run, monkeypatch):
    """More steps never find less, nor do more starts; what is found is the KL of masks in [g, 1], and its sites add to it."""
    found, (batch, target, g) = attacked(tiny_run)
    assert [rung.steps for rung in found.rungs] == [1, 2, 4, 8]
    for before, after in pairwise(found.rungs):
        assert after.worst >= before.worst
        assert after.one_start >= before.one_start
    for rung in found.rungs:
        assert rung.worst >= rung.one_start
        assert rung.share == rung.worst / found.all_off
    at = LossAt()
    off = {site: Replacement(torch.zeros_like(value)) for site, value in g.items()}
    with torch.no_grad():
        all_off = at.divergence(at.log_probs(target.logits), tiny_run.decomposition(batch.inputs, [off]))[0].item()
    assert found.all_off == near(all_off, TOY, size=10)
    assert found.sites.keys() == g.keys()
    assert all(drop <= found.rungs[-1].worst + bound(TOY, 10) for drop in found.sites.values())
    in_turns, _ = attacked(tiny_run, at_once=3, monkeypatch=monkeypatch)
    assert in_turns.rungs[0].worst == near(found.rungs[0].worst, TOY_STEP, size=10)
    alone, _ = attacked(tiny_run, starts=1)
    assert alone.rungs[-1].worst == alone.rungs[-1].one_start
    one = adversarial_recon(tiny_run.decomposition, batch.inputs, target, g, at=at, generator=generator("attack"), steps=8)
    assert one == near(alone.rungs[-1].one_start, TOY_STEP, size=10)


def test_an_attack_uses_the_remainder_if_it_is_a_component(tmp_path):
    """With no subcomponents to turn on (g = 1 everywhere), Δ alone is left to attack."""
    losses = {"stochastic_recon": 1.0, "minimality": 0.01}
    run = decompose_config(tiny_with(C=2, delta=True, losses=losses, steps=2), out=tmp_path / "run")
    assert run.task is not None
    batch = run.task.batch(0, "evaluate")
    target = run.decomposition.target_run(batch.inputs)
    ones = {name: torch.ones(*batch.inputs.shape, 2) for name in run.decomposition.names}
    how = {"at": LossAt(), "generator": generator("attack"), "steps": (6,), "starts": 2}
    with_it = attack(run.decomposition, batch.inputs, target, ones, **how)
    one_start = adversarial_recon(run.decomposition, batch.inputs, target, ones, at=LossAt(), generator=generator("one"), steps=6)
    run.decomposition.delta = False
    without = attack(run.decomposition, batch.inputs, target, ones, **how)
    plan = {name: Replacement(value) for name, value in ones.items()}
    at = LossAt()
    with torch.no_grad():
        recon = at.divergence(at.log_probs(target.logits), run.decomposition(batch.inputs, [plan]))[0].item()
    assert without.rungs[-1].worst == near(recon, TOY, size=10)  # masks can only be 1
    assert with_it.rungs[-1].worst != without.rungs[-1].worst
    assert with_it.lacking is not None
    assert with_it.lacking.endswith("or has been merged; the search moves the remainders Δ alone")
    assert without.lacking is not None
    assert without.lacking.endswith("with nothing to move, the figures are those of the importances")
    almost = ones | {name: value.clone().index_fill_(0, torch.tensor([1]), 0.9) for name, value in list(ones.items())[-1:]}
    assert attack(run.decomposition, batch.inputs, target, almost, **how).lacking is None
    present = torch.ones(batch.inputs.shape, dtype=torch.bool).index_fill_(0, torch.tensor([1]), False)
    padded = attack(run.decomposition, batch.inputs, target, almost, **how | {"at": LossAt(present=present)})
    assert padded.lacking == without.lacking
    assert one_start != near(recon, TOY, size=10)


def test_circuit_and_page_tell_that_all_was_merged(tmp_path):
    """A decomposition of which nothing but Δ is left: the figures are true; table, verdict and page say what they are of."""
    losses = {"stochastic_recon": 1.0, "minimality": 0.01}
    run = decompose_config(tiny_with(C=2, delta=True, losses=losses, steps=2), out=tmp_path / "run")
    with torch.no_grad():
        for V in run.decomposition.V.values():
            V.zero_()
    found = circuit(run, batches=1, adversary=1)
    assert found.nothing_to_attack is not None
    [table] = [table for table in found.tables() if table.title.startswith("Worst masks on the first batch")]
    assert [note.text for note in table.notes] == [found.nothing_to_attack]
    verdict = next(each for each in found.verdicts if each.name == "worst case")
    assert verdict.text.endswith(f"Here {found.nothing_to_attack}.")
    run.save_analysis("circuit", found.to_json())
    html = report(run).read_text(encoding="utf-8")
    assert html.count(f"Here {found.nothing_to_attack}.") == 2
    assert "Most of it is at" not in html


def test_circuit_tells_the_ladder(tiny_run):
    found = circuit(tiny_run, batches=1, adversary=21)
    assert [rung.steps for rung in found.adversary] == [20, 21]
    assert found.metrics["recon_worst"] == found.adversary[-1].worst
    assert found.attacked.keys() == set(tiny_run.decomposition.names)
    assert found.nothing_to_attack is None
    document = found.to_json()
    assert document["adversary"][0].keys() == {"steps", "one_start", "worst", "share"}
    [table] = [table for table in found.tables() if table.title.startswith("Worst masks on the first batch")]
    assert [len(each) for each in table.rows] == [4, 4]
    verdict = next(each for each in found.verdicts if each.name == "worst case")
    worst = max(found.metrics["recon_adversarial"], found.metrics["recon_worst"])
    assert verdict.figure == (f"{worst:.1e} nats" if worst < 0.01 else f"{worst:.2f} nats")
