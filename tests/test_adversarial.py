"""The loss at chosen masks: its sources stay in [0, 1] and climb, each group of rows has its own, and it waits for its start."""

import pytest
import torch

from conftest import tiny_with
from paramlens.errors import ConfigError
from paramlens.method.evaluate import importances
from paramlens.method.generators import generator
from paramlens.method.losses.adversarial import adversarial_loss, fresh_sources, sourced_plan
from paramlens.method.losses.loss import LossInputs
from paramlens.method.settings import Adversary
from paramlens.runs.decompose import decompose_config


def known(run, **how: float) -> LossInputs:
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adversary": {"start": 1}}, "adversary.start"),
        ({"adversary": {"groups": 2}}, r"adversary\.\* is for losses.adversarial, which is 0; give it a coefficient"),
        ({"losses": {"adversarial": 1.0}, "device": "cuda", "cuda_graph": True}, "cuda_graph true replays one step"),
    ],
)
def test_what_it_cannot_be_is_refused(fields: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        tiny_with(**fields)
