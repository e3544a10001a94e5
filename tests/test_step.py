"""A step's guard and its replay, as far as a CPU can try what is meant for a GPU."""

import shutil
from pathlib import Path

import pytest
import torch

from conftest import tiny_with
from paramlens import decompose
from paramlens.errors import BatchError, ConfigError
from paramlens.kernels.machine import machine
from paramlens.method import step as step_module
from paramlens.method.losses.faithfulness import faithfulness
from paramlens.method.losses.minimality import annealed_p
from paramlens.runs.train import set_rates
from rounding import near
from toy_steps import batch, make, no_update_follows_a_broken_gradient, parameters, run_unchecked


def test_a_guard_that_does_not_wait_keeps_every_later_update_out():
    """As on a GPU: no check between steps, the optimizer skips from the broken step on, and the next look tells."""
    steps = make()
    steps.waits = False
    steps.optimizer.found_inf = steps.broken
    no_update_follows_a_broken_gradient(steps)


class Recorded:
    """What CudaGraph does, by calling the captured function again."""

    def warm(self, function):
        self.last = function()
        return self.last

    def capture(self, function, rng):
        self.function = function
        return self.last

    def replay(self):
        self.function()


def test_a_replayed_step_is_the_step(monkeypatch: pytest.MonkeyPatch):
    """Inputs, power, rates and noise reach a step that is captured once: its updates equal those of ordinary steps with that noise."""
    monkeypatch.setattr(step_module, "CudaGraph", Recorded)
    losses = {"stochastic_recon": 1.0, "stochastic_recon_layerwise": 1.0, "recon": 0.5, "faithfulness": 10.0, "minimality": 0.1}
    replayed, ordinary = make(losses=losses, dtype="float64"), make(losses=losses, dtype="float64")
    replayed.replay = step_module._Replay(replayed)
    p: list[float] = []
    original = step_module.training_step

    def noting(*args, **kwargs):
        p.append(float("nan" if kwargs["p"] is None else kwargs["p"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(step_module, "training_step", noting)
    for i in range(6):
        share = 1.0 - i / 10
        for steps in (replayed, ordinary):
            set_rates(steps.optimizer, share)
        replayed(batch(replayed, i), i)
        rng = torch.Generator().manual_seed(step_module.seed_of(ordinary.config.seed, "masks", i))
        with step_module.noise_from(rng):
            ordinary.run(batch(ordinary, i), i)
    for mine, other in zip(parameters(replayed), parameters(ordinary), strict=True):
        torch.testing.assert_close(mine, other)  # of double precision: 1e-7, some 10^8 roundings
    assert p[::2] == pytest.approx([annealed_p(replayed.config.losses, i, replayed.config.steps) for i in range(6)])
    with pytest.raises(BatchError, match="replays one shape of batch"):
        replayed(batch(replayed, 6).map(lambda tensor: tensor[:1]), 6)


def test_rates_reach_an_optimizer_that_reads_them_from_tensors():
    steps = make()
    kept = [torch.zeros(()) for _ in steps.optimizer.param_groups]
    for group, tensor in zip(steps.optimizer.param_groups, kept, strict=True):
        group["lr"] = tensor
    set_rates(steps.optimizer, 0.5)
    assert [group["lr"] for group in steps.optimizer.param_groups] == kept
    assert kept[0].item() == near(0.5 * steps.config.optim.lr, 2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_steps_are_the_same_steps(tmp_path: Path):
    run_unchecked("compiled_steps_are_the_same_steps", "cpu", cache=tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cuda_graph": True}, "cuda_graph true needs device cuda, not cpu"),
        ({"cuda_graph": True, "device": "cuda", "optim": {"project_from": 0.0}}, "cannot capture the projection"),
        ({"cuda_graph": True, "device": "cuda", "losses": {"recon_partial": 1.0}}, "cuda_graph true replays one set of plans"),
        ({"cuda_graph": True, "device": "cuda", "losses": {"recon_layerwise": 1.0, "layerwise_sites": 2}}, "replays one set of plans"),
        ({"matmul": "fp16"}, "matmul: 'fp16': give 'fp32', 'tf32' or 'bf16'"),
        ({"losses": {"recon_layerwise": 1.0, "layerwise_sites": 0}}, "layerwise_sites"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        tiny_with(**fields)


def test_the_machine_is_left_as_it_was():
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), machine(tiny_with(threads=2, matmul="tf32")):
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (2, "high")
        raise KeyError
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


def test_steps_keep_to_the_sum_from_the_share_on():
    """Up to half of the steps U V strays from W, after that it is W to rounding; the faithfulness loss is not needed for it."""
    steps = make(steps=6, optim={"project_from": 0.5, "lr": 3e-3}, losses={"recon": 1.0, "minimality": 0.1})
    off = []
    for step in range(6):
        steps(batch(steps, step), step)
        off.append(faithfulness(steps.decomposition).item())
    assert min(off[:3]) > 1e-8
    assert max(off[4:]) < 1e-3 * min(off[:3])
    moved = [(new - old).abs().max() for new, old in zip(parameters(steps), parameters(make()), strict=True)]
    assert min(moved[: len(list(steps.decomposition.parameters()))]) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", ["faithfulness", "minimality", "local"])
def test_a_loss_that_runs_no_masks_may_stand_alone(tmp_path, loss, dtype):
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5)).to(getattr(torch, dtype))
    how = {"sites": ["1"], "C": 3, "steps": 2, "threads": 1, "dtype": dtype, "gamma": {"kind": "vector", "d_gate": 2}}
    run = decompose(model, [torch.tensor([[0, 1, 2], [3, 4, 0]])], out=tmp_path / "run", losses={loss: 1.0}, log_every=1, **how)
    assert run.metrics[0]["losses"][loss] > 0
