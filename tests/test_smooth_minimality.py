"""The smooth count against its equation in a loop; often costs more; its width narrows; and gradients clipped apart."""

import pytest
import torch

import reference
from conftest import tiny_with
from paramlens.errors import ConfigError
from paramlens.method.losses.smooth_minimality import annealed_width, smooth_minimality
from paramlens.method.settings import Smooth
from paramlens.method.step import Steps
from paramlens.runs.decompose import decompose_config
from rounding import assert_near, near

ROUNDINGS = 60
"""φ (4), its mean over at most 12 positions, the logarithm (4), the sum over at most 8 subcomponents; twice that for a slope."""


@pytest.mark.parametrize("width", [1.0, 0.1, 0.01])
def test_the_equation(width: float):
    pre = torch.randn(3, 4, 5, dtype=torch.float64).requires_grad_()
    ours, theirs = smooth_minimality(pre, width=width, settings=Smooth()), reference.smooth_minimality({"a": pre}, width, 0.5, 4096.0)
    assert_near(ours, theirs, ROUNDINGS)
    assert_near(*(torch.autograd.grad(value, pre)[0] for value in (ours, theirs)), ROUNDINGS)


def test_absent_positions_cost_nothing():
    pre = torch.rand(2, 3, 4, dtype=torch.float64)
    padded = torch.cat([pre, torch.zeros_like(pre)], 1)
    alone, beside = (smooth_minimality(value, width=0.5, settings=Smooth(), present=share) for value, share in ((pre, 1.0), (padded, 0.5)))
    assert_near(beside, alone, ROUNDINGS)


def test_one_part_everywhere_costs_more_than_as_many_importances_of_several():
    everywhere, shared = torch.zeros(1, 8, 8), torch.eye(8)[None]
    everywhere[..., 0] = 1
    often, seldom = (smooth_minimality(pre, width=0.01, settings=Smooth()).item() for pre in (everywhere, shared))
    assert often > seldom
    flat = Smooth(frequency_weight=0.0)
    assert smooth_minimality(everywhere, width=0.01, settings=flat).item() == near(
        smooth_minimality(shared, width=0.01, settings=flat).item(), ROUNDINGS
    )


def test_the_width_narrows_over_the_run():
    widths = [annealed_width(Smooth(start=1, final=0.1), step, 10) for step in range(10)]
    assert widths == sorted(widths, reverse=True)
    assert (widths[0], widths[-1]) == (1, near(0.1, 4, size=1))


def test_a_run_lowers_it(tmp_path):
    config = tiny_with(losses={"recon": 1.0, "smooth_minimality": 0.5}, smooth={"start": 0.1, "final": 0.1}, steps=30, log_every=1)
    logged = [line["losses"]["smooth_minimality"] for line in decompose_config(config, out=tmp_path / "run").metrics if "losses" in line]
    assert logged[-1] < logged[0]


def test_the_log_has_the_width_as_it_narrows(tmp_path, tiny_run):
    config = tiny_with(losses={"recon": 1.0, "smooth_minimality": 0.1}, smooth={"start": 1.0, "final": 0.1}, steps=3, log_every=1)
    run = decompose_config(config, out=tmp_path / "run")
    assert [line["width"] for line in run.metrics if "losses" in line] == near([1.0, 0.55, 0.1], 8)
    assert not any("width" in line for line in tiny_run.metrics)


def test_gradients_are_clipped_apart(tiny_run):
    assert tiny_run.task is not None
    config = tiny_run.config.model_copy(update={"optim": tiny_run.config.optim.model_copy(update={"clip": 1e-4})})
    decomposition, importance = tiny_run.decomposition, tiny_run.importance
    optimizer = torch.optim.SGD([*decomposition.parameters(), *importance.parameters()], lr=0.0)
    Steps(config, tiny_run.task, decomposition, importance, optimizer)(tiny_run.task.batch(0, "train"), 0)
    for parameters in (decomposition.U.values(), decomposition.V.values(), importance.parameters()):
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        assert norm.item() == pytest.approx(1e-4, rel=0.02)  # the divisor has 1e-6 added


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"smooth": {"start": 0.1, "final": 0.2}}, "annealed downwards"),
        ({"optim": {"clip": 0}}, "optim.clip"),
        ({"smooth": {"final": 0.5}}, r"smooth\.\* is for losses.smooth_minimality, which is 0"),
        ({"losses": {"smooth_minimality": 1.0}, "device": "cuda", "cuda_graph": True}, "changes its width"),
    ],
)
def test_what_it_cannot_be_is_refused(fields: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        tiny_with(**fields)
