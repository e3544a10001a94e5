"""The remainder Δ = W - U V as a component: all components add up to W, whatever C is, and Δ is only where it belongs."""

import pytest
import torch

from conftest import TINY, tiny_with
from paramlens.analysis.catalogue import catalogue
from paramlens.analysis.circuit import circuit
from paramlens.errors import ConfigError
from paramlens.method.decomposition import Decomposition
from paramlens.method.generators import generator
from paramlens.method.losses.reconstruction import RECONSTRUCTIONS
from paramlens.method.masks import Replacement
from paramlens.method.settings import Init
from paramlens.method.sites import find_sites
from paramlens.method.start import initialise, out_of_reach
from paramlens.runs.decompose import decompose_config
from paramlens.runs.rundir import open_run
from rounding import TOY, assert_near

C = 3  # below the rank of the weights, which is 4


@pytest.fixture
def decomposition(target) -> Decomposition:
    made = Decomposition(target, find_sites(target, TINY["sites"]), C=C, delta=True)
    initialise(made, Init(kind="random"), generator=generator("test"))
    return made


def tokens() -> torch.Tensor:
    return torch.randint(7, (3, 8), generator=generator("tokens"))


def masks(decomposition: Decomposition, r: float, m: float | torch.Tensor | None) -> dict[str, Replacement]:
    remainder = torch.full((3, 8), m) if isinstance(m, float) else m
    return {name: Replacement(torch.full((3, 8, C), r), remainder=remainder) for name in decomposition.names}


def test_all_components_on_are_the_target(decomposition, target):
    assert_near(decomposition(tokens(), [masks(decomposition, 1.0, 1.0)])[0], target(tokens()), TOY + 8 * C)


def test_the_remainder_alone_is_the_weight_without_the_sum_of_its_parts(decomposition, target):
    found = decomposition(tokens(), [masks(decomposition, 0.0, 1.0)])[0]
    with torch.no_grad():
        for site, U, V in zip(decomposition.sites, decomposition.U.values(), decomposition.V.values(), strict=True):
            site.write(site.W - U @ V)
    assert_near(found, target(tokens()), TOY + 16 * C)


def test_left_out_it_is_off(decomposition):
    without, off = decomposition(tokens(), [masks(decomposition, 0.5, None)]), decomposition(tokens(), [masks(decomposition, 0.5, 0.0)])
    assert_near(without, off, TOY + 8 * C)


def test_one_plan_has_it_and_the_next_has_not(decomposition):
    """Stacked plans are those run alone, in whatever order they come; where a plan is not replaced the target runs."""
    some = torch.rand(3, 8, generator=generator("some"))
    half = torch.arange(8).expand(3, 8) < 4
    plans = [masks(decomposition, 0.5, m) for m in (None, some, 1.0, None)]
    plans.insert(2, {name: Replacement(each.g, 5, half, remainder=some) for name, each in plans[0].items()})
    stacked = decomposition(tokens(), plans)
    for plan, logits in zip(plans, stacked, strict=True):
        assert_near(logits, decomposition(tokens(), [plan])[0], TOY + 8 * C)


def test_it_is_random_in_stochastic_losses_and_off_in_the_others():
    g = {"a": torch.rand(2, 5, C), "b": torch.rand(2, 5, C)}
    for loss in RECONSTRUCTIONS.values():
        plans = [plan for seed in range(40) for plan in loss.plans(g, delta=True, generator=generator("plans", seed))]
        given = [each.remainder for plan in plans for each in plan.values()]
        if loss.mask == "importance":
            assert given == [None] * len(given)
            continue
        values = torch.stack([each for each in given if each is not None])
        assert values.shape == (len(given), 2, 5)
        assert (values >= 0).all()
        assert (values < 1).all()
        assert len(values.unique()) > 0.99 * values.numel()
        assert abs(values.mean().item() - 0.5) < 5 * (1 / 12 / values.numel()) ** 0.5
    assert all(
        each.remainder is None for plan in RECONSTRUCTIONS["stochastic_recon"].plans(g, generator=generator("x")) for each in plan.values()
    )


def test_a_run_below_the_rank_is_the_weight_at_every_step(tmp_path):
    """It starts, trains, opens and goes on; what removes parts from the target leaves Δ on, and Δ's share is told."""
    losses = {"stochastic_recon": 1.0, "recon": 0.5, "minimality": 0.01}
    config = tiny_with(C=C, delta=True, losses=losses, steps=8, checkpoint={"every": 4})
    run = decompose_config(config, out=tmp_path / "run")
    again = open_run(run.path)
    assert again.decomposition.delta
    shares = again.decomposition.remainders()
    assert all(0 < share <= 1.5 for share in shares.values())
    found = circuit(again, batches=1, adversary=0)
    assert {name: site.remainder for name, site in found.sites.items()} == shares
    removed = catalogue(again, batches=1)
    assert removed.to_json()["sites"].keys() == shares.keys()


def test_without_it_too_few_subcomponents_are_told_of(target):
    sites = find_sites(target, TINY["sites"])
    assert out_of_reach(Decomposition(target, sites, C=C, delta=True)) is None
    assert out_of_reach(Decomposition(target, sites, C=4)) is None
    told = out_of_reach(Decomposition(target, sites, C=C))
    assert told is not None
    assert told.startswith("C 3 is below the rank 4 that the weight at blocks.0.attn.q and 5 more sites can have")
    assert told.endswith("Give delta true, which makes that part a component, or C 4")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"delta": True, "optim": {"project_from": 0.5}}, "optim.project_from 0.5 keeps U V = W, and with delta true"),
    ],
)
def test_what_excludes_it_is_refused(fields: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        tiny_with(**fields)
