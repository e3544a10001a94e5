"""The loss at chosen masks: its sources stay in [0, 1] and climb, each group of rows has its own, and it waits for its start."""

import dataclasses
import shutil

import pytest
import torch

from conftest import tiny_with
from paramlens.errors import ConfigError
from paramlens.files.tensorfile import load_tensors
from paramlens.method.evaluate import importances
from paramlens.method.generators import generator
from paramlens.method.losses.adversarial import adversarial_loss, sourced_plan
from paramlens.method.losses.loss import LossInputs
from paramlens.method.settings import Adversary
from paramlens.method.sources import PersistentSources, fresh_sources
from paramlens.runs.decompose import decompose_config
from paramlens.runs.layout import checkpoints
from paramlens.runs.rundir import open_run


def known(run, **how: object) -> LossInputs:
    """The inputs of a step on a finished run."""
    assert run.task is not None
    config = run.config.model_copy(update={"adversary": Adversary(start=0, **how)})
    batch = run.task.batch(0, "train")
    target, g = importances(run.decomposition, run.importance, batch)
    return LossInputs(config, run.task, run.decomposition, batch, target, {}, g, 5, 0.5)


def test_more_ascents_find_more(tiny_run):
    with torch.no_grad():
        found = [adversarial_loss(known(tiny_run, ascents=ascents, step_size=0.05, groups=4)) for ascents in (1, 4, 16)]
    values = [value.item() for value in found if value is not None]
    assert len(values) == 3
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_sources_are_uniform_or_at_corners():
    g = {"a": torch.rand(2, 3, 500), "b": torch.rand(2, 3, 400)}
    sources = fresh_sources(g, groups=5, delta=True, generator=generator("sources"))
    assert {site: value.shape for site, value in sources.items()} == {"a": (5, 501), "b": (5, 401)}
    for value in sources.values():
        assert (value >= 0).all()
        assert (value <= 1).all()
        assert [set(row.unique().tolist()) == {0.0, 1.0} for row in value] == [False, True, False, True, False]


def test_a_group_shares_its_sources_over_rows_and_positions():
    g = {"a": torch.rand(5, 4, 3)}
    sources = {"a": torch.rand(2, 4)}
    [(_, replacement)] = sourced_plan(g, sources, delta=True).items()
    s = ((replacement.g - g["a"]) / (1 - g["a"]))[:, :, 0]
    groups = [0, 0, 0, 1, 1]
    torch.testing.assert_close(s, sources["a"][groups, :1].expand(5, 4), rtol=1e-4, atol=1e-5)
    assert replacement.remainder is not None
    assert replacement.remainder.equal(sources["a"][groups, 3:].expand(5, 4))
    assert (replacement.g >= g["a"]).all()
    assert (replacement.g <= 1).all()
    assert sourced_plan(g, sources, delta=False)["a"].remainder is None


def test_a_run_begins_without_it(tmp_path):
    losses = {"recon": 1.0, "adversarial": 1.0, "minimality": 0.01}
    config = tiny_with(losses=losses, delta=True, C=3, adversary={"start": 0.5}, steps=8, log_every=1)
    run = decompose_config(config, out=tmp_path / "run")
    logged = [line["losses"] for line in run.metrics if "losses" in line]
    assert ["adversarial" in each for each in logged] == [False] * 4 + [True] * 4
    assert all(each["adversarial"] > 0 for each in logged[4:])


def test_persistent_sources_go_on_where_they_were(tiny_run):
    """A step begins at what the step before has kept, which stays in [0, 1]; groups that a small batch does not have stay as they are."""
    with torch.no_grad():
        adversarial_loss(first := known(tiny_run, sources="persistent", ascents=2, groups=3))
    first.sources.after_backward(0.4)
    assert first.sources.kept == {}, "these are the fresh ones of the default"
    sources = PersistentSources()
    one = dataclasses.replace(first, sources=sources)
    rows = len(next(iter(one.g.values())))
    began = sources.first(one.g, groups=3, rows=rows, delta=False, generator=generator("first"))
    assert all(value.equal(sources.kept[site]) for site, value in began.items())
    loss = adversarial_loss(one)
    assert loss is not None
    loss.backward()
    sources.after_backward(0.4)
    again = sources.first(one.g, groups=3, rows=2, delta=False, generator=generator("second"))
    assert all(value.equal(sources.kept[site][:2]) for site, value in again.items())
    assert any(not value.equal(sources.kept[site]) for site, value in began.items())
    third = {site: value[2].clone() for site, value in sources.kept.items()}
    sources.last({site: torch.full_like(value, 0.5) for site, value in again.items()})
    sources.after_backward(0.4)
    for site, value in sources.kept.items():
        assert value[:2].eq(0.5).all(), "without a backward pass they stay where the ascents left them"
        assert value[2].equal(third[site])
        assert (value >= 0).all()
        assert (value <= 1).all()


def test_persistent_sources_lose_what_a_merge_takes():
    sources = PersistentSources()
    sources.take("a", torch.tensor([2]))  # before the adversary has begun there is nothing to lose
    sources.kept = {"a": torch.tensor([[0.1, 0.2, 0.3, 0.9], [0.4, 0.5, 0.6, 0.8]])}
    sources.take("a", torch.tensor([2, 0]))
    assert sources.kept["a"].equal(torch.tensor([[0.3, 0.1, 0.9], [0.6, 0.4, 0.8]]))


def test_persistent_sources_go_on_in_the_same_bytes_across_a_merge(tmp_path):
    losses = {"stochastic_recon": 1.0, "recon": 1.0, "adversarial": 1.0, "minimality": 0.3}
    merge = {"every": 2, "start": 0.2, "threshold": 0.45, "memory": 2}
    how = {"adversary": {"sources": "persistent", "start": 0.1, "groups": 3}, "checkpoint": {"every": 2, "keep_last": 6}}
    config = tiny_with(losses=losses, delta=True, C=8, merge=merge, optim={"lr": 0.05}, steps=12, log_every=1, **how)
    whole = decompose_config(config, out=tmp_path / "whole").path
    shutil.copytree(whole, copy := tmp_path / "copy")
    for folder in checkpoints(copy):
        if int(folder.name.removeprefix("step-")) > 6:
            shutil.rmtree(folder)
    C = [open_run(whole, checkpoint=step).decomposition.C for step in (6, 12)]
    assert sum(C[1].values()) < sum(C[0].values())
    assert open_run(decompose_config(config, out=copy, resume=True).path).status == "finished"
    for name in ("components", "importance", "optimizer"):
        last = f"checkpoints/step-00000012/{name}.safetensors"
        assert (copy / last).read_bytes() == (whole / last).read_bytes()
    kept = load_tensors(whole / "checkpoints/step-00000012/optimizer.safetensors")
    assert {site: kept[f"sources.{site}"].shape for site in C[1]} == {site: (3, count + 1) for site, count in C[1].items()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adversary": {"start": 1}}, "adversary.start"),
        ({"losses": {"adversarial": 1.0}, "adversary": {"start": 0.9}, "steps": 5}, "begins after the last of 5 steps"),
        ({"losses": {"adversarial": 1.0}}, "losses.adversarial is the only loss and begins after a share of 0.35"),
        ({"losses": {"adversarial": 1.0}, "adversary": {"ascents": 0}}, "ascents 0: fresh sources that do not climb are random masks"),
        ({"adversary": {"sources": "persistent"}}, r"adversary\.\* is for losses.adversarial, which is 0; give it a coefficient"),
        ({"adversary": {"groups": 2}}, r"adversary\.\* is for losses.adversarial, which is 0; give it a coefficient"),
        ({"losses": {"recon": 1.0, "adversarial": 1.0}, "device": "cuda", "cuda_graph": True}, "cuda_graph true replays one step"),
    ],
)
def test_what_it_cannot_be_is_refused(fields: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        tiny_with(**fields)
