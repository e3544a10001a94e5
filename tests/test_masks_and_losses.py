import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import tiny_with
from paramlens.method.decomposition import Decomposition
from paramlens.method.generators import generator
from paramlens.method.importance.sigmoids import lower, upper
from paramlens.method.losses.divergence import kl_divergence
from paramlens.method.losses.faithfulness import faithfulness
from paramlens.method.losses.minimality import annealed_p, minimality
from paramlens.method.losses.reconstruction import RECONSTRUCTIONS
from paramlens.method.masks import mask_noise, rounded_mask, site_subsets, stochastic_mask, subset_shape
from paramlens.method.settings import Losses
from paramlens.method.sites import find_sites
from rounding import near


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20))
def test_importance_lies_in_0_1_and_masks_in_g_1(values: list[float]):
    g = lower(torch.tensor(values, dtype=torch.float64))
    assert ((g >= 0) & (g <= 1)).all()
    mask = stochastic_mask(g, mask_noise(1, g))
    assert ((mask >= g) & (mask <= 1)).all()
    assert (upper(torch.tensor(values, dtype=torch.float64)) >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stochastic_mask_is_uniform_above_g(dtype: torch.dtype):
    g = torch.full((200_000,), 0.6, dtype=dtype)
    mask = stochastic_mask(g, mask_noise(2, g))
    assert mask.mean().item() == pytest.approx(0.8, abs=2e-3)
    assert mask.var().item() == pytest.approx(0.16 / 12, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_uniform_and_unrelated_between_places_and_keys(dtype: torch.dtype):
    like = torch.empty(500, 400, dtype=dtype)
    u, other = mask_noise(7, like), mask_noise(2**31 - 5, like)
    assert torch.equal(u, mask_noise(7, like))
    assert (u >= 0).all()
    assert (u < 1).all()
    counts = torch.histc(u.float(), 64, 0, 1)
    assert ((counts - u.numel() / 64).square().sum() / (u.numel() / 64)).item() < 120  # χ² of 63 degrees of freedom, p < 1e-5
    pairs = torch.stack([u[:-1].flatten(), u[1:].flatten(), other[1:].flatten()])
    neighbours = torch.stack([u.flatten()[:-1], u.flatten()[1:]])
    assert (torch.corrcoef(pairs) - torch.eye(3, dtype=dtype)).abs().max() < 0.012
    assert torch.corrcoef(neighbours)[0, 1].abs() < 0.012


PLACES = 200_000


def noise(key: int, dtype: torch.dtype) -> torch.Tensor:
    return mask_noise(key, torch.empty(PLACES, dtype=dtype)).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_key_is_another_one_shifted(dtype: torch.dtype):
    """Neighbouring keys at every lag of places: the largest of that many correlations stays within what chance allows.

    Of m independent ones, each of deviation 1 / √n, none exceeds √(2 ln m + 2 ln 10^5) / √n but once in 10^5 times.
    """
    length, key = 2 * PLACES, 12345
    spectra = [torch.fft.rfft(noise(key + other, dtype) - 0.5, length) for other in (0, 1, 2, 2**16, 2**20)]
    first, others = spectra[0], spectra[1:]
    for i, other in enumerate([first, *others]):
        correlation = torch.fft.irfft(first.conj() * other, length) * 12 / PLACES
        if i == 0:
            assert correlation[0].item() == pytest.approx(1, abs=0.02)
            correlation[0] = 0
        bound = math.sqrt(2 * math.log(length * len(spectra)) + 2 * math.log(1e5)) / math.sqrt(PLACES)
        assert correlation.abs().max().item() < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("key", [0, 1, 2**16, 2**31 - 1])
def test_noise_of_any_key_is_uniform(key: int, dtype: torch.dtype):
    """Mean, variance and the Kolmogorov-Smirnov distance, each within five deviations (KS: p < 10^-6) of n independent draws."""
    u = noise(key, dtype)
    assert abs(u.mean().item() - 1 / 2) < 5 / math.sqrt(12 * PLACES)
    assert abs(u.var().item() - 1 / 12) < 5 / math.sqrt(180 * PLACES)
    distance = (u.sort().values - (torch.arange(PLACES) + 0.5) / PLACES).abs().max().item()
    assert distance < 2.7 / math.sqrt(PLACES)


def test_noise_does_not_depend_on_threads():
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(mask_noise(3, torch.empty(3, 5000)))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(*found)


def test_rounded_mask():
    assert rounded_mask(torch.tensor([0.0, 0.1, 0.1001, 1.0]), threshold=0.1).tolist() == [0, 0, 1, 1]


def test_subsets_have_uniform_size_and_members():
    """k ~ U{1..4}, so each site is in with probability mean(k) / 4 = 0.625."""
    inside = site_subsets(4, (40_000,), generator(3))
    sizes = torch.bincount(inside.sum(0), minlength=5)[1:] / 40_000
    assert sizes.tolist() == pytest.approx([0.25] * 4, abs=0.01)
    assert inside.float().mean(1).tolist() == pytest.approx([0.625] * 4, abs=0.01)


def test_subset_shapes():
    assert subset_shape("forward", (2, 5)) == ()
    assert subset_shape("sequence", (2, 5)) == (2, 1)
    assert subset_shape("position", (2, 5)) == (2, 5)


@pytest.mark.parametrize("scope", ["sequence", "position"])
def test_partial_plans_by_scope(scope):
    g = {name: torch.rand(6, 5, 3) for name in "abc"}
    (plan,) = RECONSTRUCTIONS["recon_partial"].plans(g, partial_scope=scope, generator=generator(0))
    inside = torch.stack([plan[name].where.expand(6, 5) for name in "abc"])
    assert inside.any(0).all(), "every draw replaces one site at least"
    constant = (inside == inside[:, :, :1]).all()
    assert constant if scope == "sequence" else not constant


def test_plans_per_loss():
    g = {name: torch.rand(2, 4, 3) for name in "abc"}
    counts = {name: len(list(loss.plans(g, samples=2, generator=generator(0)))) for name, loss in RECONSTRUCTIONS.items()}
    assert counts == {
        "stochastic_recon": 2,
        "stochastic_recon_layerwise": 6,
        "recon": 1,
        "recon_layerwise": 3,
        "recon_partial": 1,
        "stochastic_recon_partial": 2,
    }


def test_layerwise_sites_are_drawn_evenly():
    """k of the sites a step, each equally often, so that the mean over them is an unbiased estimate of the mean over all."""
    g = {name: torch.rand(2, 4, 3) for name in "abcde"}
    counts = Counter[str]()
    for step in range(2000):
        plans = list(RECONSTRUCTIONS["recon_layerwise"].plans(g, layerwise_sites=2, generator=generator(step)))
        assert len(plans) == 2
        assert all(len(plan) == 1 for plan in plans)
        names = [next(iter(plan)) for plan in plans]
        assert len(set(names)) == 2
        counts.update(names)
    assert all(abs(count - 800) < 100 for count in counts.values())
    assert len(list(RECONSTRUCTIONS["recon_layerwise"].plans(g, layerwise_sites=9, generator=generator(0)))) == 5


def test_divergence_by_hand():
    """KL((3/4, 1/4) ‖ (1/2, 1/2)) = 3/4 ln 3/2 + 1/4 ln 1/2, and 0 of a distribution to itself."""
    target = torch.tensor([[[0.75, 0.25]]]).log()
    logits = torch.stack([torch.zeros(1, 1, 2), target])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(target, logits).tolist() == near([expected, 0.0], 8, size=-math.log(0.25))


def test_faithfulness_by_hand():
    linear = nn.Linear(2, 1, bias=False)
    decomposition = Decomposition(nn.Sequential(linear), find_sites(nn.Sequential(linear), ["0"]), C=1)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[3.0, 5.0]]))
        decomposition.U["0"].copy_(torch.tensor([[1.0], [1.0]]))
        decomposition.V["0"].fill_(4.0)
    assert faithfulness(decomposition).item() == near(1.0, 4)


@pytest.mark.parametrize("eps", [1e-12, 1e-6])
@pytest.mark.parametrize("p", [0.9, 0.1])
def test_minimality_has_no_constant_and_a_finite_slope(p: float, eps: float):
    pre = torch.tensor([[[-1.0, 0.0, 1e-30, 0.25, 1.0]]], dtype=torch.float64, requires_grad=True)
    zeros = minimality({"site": torch.zeros(1, 1, 100, dtype=torch.float64)}, p=p, eps=eps)
    assert zeros.item() == 0.0
    value = minimality({"site": pre}, p=p, eps=eps)
    assert value.item() == pytest.approx(sum((g + eps) ** p - eps**p for g in (0, 0, 1e-30, 0.25, 1.0)), rel=1e-12)
    (slope,) = torch.autograd.grad(value, pre)
    assert torch.isfinite(slope).all()
    assert slope[0, 0, :2].tolist() == [0, 0]
    assert slope[0, 0, 3].item() == pytest.approx(p * (0.25 + eps) ** (p - 1))


def test_minimality_is_a_mean_over_positions_and_a_sum_over_sites():
    g = torch.ones(2, 3, 4)
    assert minimality({"a": g, "b": g}, p=0.5, eps=1e-12).item() == near(8.0, 24 + 64)


def test_p_is_annealed_linearly_over_the_run():
    losses = Losses(recon=1.0, p_start=0.9, p_final=0.1)
    assert [annealed_p(losses, step, 5) for step in range(5)] == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])
    assert annealed_p(losses, 0, 1) == 0.9
    assert annealed_p(tiny_with().losses, 11, 12) == pytest.approx(0.1)
