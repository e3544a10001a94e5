"""What a GPU must do as the CPU does, and what is meant for it alone. Skipped without one."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch

from conftest import TINY, TINY_FACTS, tiny_with
from paramlens import circuit, evaluate_edit, open_run, suppress
from paramlens.analysis.components import inspect_prompt
from paramlens.config.file import make_config
from paramlens.kernels.machine import machine
from paramlens.method import masks, products
from paramlens.method.generators import generator, seed_of
from paramlens.runs.decompose import decompose_config
from paramlens.runs.layout import checkpoints
from paramlens.runs.train import set_rates
from rounding import TOY_STEP, assert_near
from toy_steps import batch, make, no_update_follows_a_broken_gradient, parameters, run_unchecked

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

PAPER = {"stochastic_recon": 1.0, "stochastic_recon_layerwise": 1.0, "recon": 0.5, "faithfulness": 10.0, "minimality": 0.1}
ROBUST: dict[str, object] = {
    "losses": {"stochastic_recon": 1.0, "recon": 1.0, "recon_layerwise": 1.0, "adversarial": 1.0, "minimality": 0.3},
    "delta": True,
    "C": 8,
    "merge": {"every": 2, "start": 0.2, "threshold": 0.45, "memory": 2},
    "adversary": {"start": 0.1, "groups": 3},
    "optim": {"lr": 0.05},
}
STEPS: dict[str, dict[str, object]] = {
    "attention": {"losses": PAPER},
    "relative encodings of queries": {"losses": PAPER, "gamma": {"kind": "attention", "d_gate": 3, "relative": "query"}},
    "attention_shared": {"losses": PAPER, "gamma": {"kind": "attention_shared", "d_gate": 3}},
    "transformer": {"losses": PAPER, "gamma": {"kind": "transformer", "d_gate": 3, "width": 8, "layers": 1, "heads": 2}},
    "vector": {"losses": PAPER, "gamma": {"kind": "vector", "d_gate": 3}},
    "shared": {"losses": PAPER, "gamma": {"kind": "shared", "d_gate": 3}},
    "scalar": {"losses": PAPER, "gamma": {"kind": "scalar", "d_gate": 3}},
    "partial losses": {"losses": {"recon_partial": 1.0, "stochastic_recon_partial": 1.0, "partial_scope": "position"}},
    "adversary, Δ": ROBUST,
    "persistent sources": ROBUST | {"adversary": {"start": 0.1, "groups": 3, "sources": "persistent"}},
    "smooth minimality": {"losses": {"recon": 1.0, "smooth_minimality": 0.1}, "optim": {"clip": 1.0}},
    "second stream": {
        "losses": {"recon": 1.0, "elsewhere": 1.0, "elsewhere_masks": "all"},
        "delta": True,
        "task": TINY["task"] | {"elsewhere": 3},
    },
}


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise from a key is the CPU's on every device."""

    def from_key(key: int, like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator("noise", key), dtype=like.dtype).to(like.device)

    for module in (masks, products):
        monkeypatch.setattr(module, "mask_noise", from_key)
    monkeypatch.setattr(masks.native, "serves", lambda *_: False)


@pytest.mark.parametrize("fields", STEPS.values(), ids=STEPS)
def test_a_step_is_the_step_of_the_cpu(fields: dict[str, object], same_noise: None):
    """In double precision: every loss and every parameter's gradient within rounding, over two steps."""
    ours, theirs = make(**fields, dtype="float64", device=DEVICE), make(**fields, dtype="float64")
    with torch.no_grad():
        for mine, other in zip(ours.parameters, theirs.parameters, strict=True):
            mine.copy_(other)  # the signs of singular vectors are a device's own
    for i in range(2):
        found, expected = ours(batch(ours, i), i), theirs(batch(theirs, i), i)
        assert found.losses.keys() == expected.losses.keys()
        for name, value in expected.losses.items():
            assert_near(found.losses[name].cpu(), value, TOY_STEP, size=max(1.0, value.item()))
        for mine, other in zip(ours.parameters, theirs.parameters, strict=True):
            assert (mine.grad is None) == (other.grad is None)
            if mine.grad is not None and other.grad is not None:
                torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-7, atol=1e-9)  # some 10^6 roundings


@pytest.mark.parametrize("fields", STEPS.values(), ids=STEPS)
def test_a_step_does_not_wait_for_the_gpu(fields: dict[str, object]):
    """Between log steps and merges the host is free to go ahead."""
    steps = make(**fields, device=DEVICE)
    steps(batch(steps, 0), 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        for i in (1, 2):
            steps(batch(steps, i), i)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_update_follows_a_gradient_that_is_not_finite():
    no_update_follows_a_broken_gradient(make(device=DEVICE))


@pytest.mark.parametrize("kind", ["attention", "vector", "transformer"])
def test_a_graph_replays_the_step(kind: str):
    """Its updates equal those of ordinary steps with that noise, also after the learning rate changes."""
    gamma = {"kind": kind, "d_gate": 3} | ({"width": 8, "layers": 1, "heads": 2} if kind == "transformer" else {})
    how = {"losses": PAPER, "dtype": "float64", "device": DEVICE, "gamma": gamma}
    replayed, ordinary = make(**how, cuda_graph=True), make(**how)
    for i in range(8):
        for steps in (replayed, ordinary):
            set_rates(steps.optimizer, 1.0 - i / 10)
        replayed(batch(replayed, i), i)
        rng = torch.Generator(device=DEVICE).manual_seed(seed_of(ordinary.config.seed, "masks", i))
        with masks.noise_from(rng):
            ordinary.run(batch(ordinary, i), i)
    assert replayed.replay is not None
    assert replayed.replay.done == 8
    for mine, other in zip(parameters(replayed), parameters(ordinary), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)  # Adam enlarges roundings; a rate that is off moves 1e-4


@pytest.mark.parametrize("check", ["compiled_steps_are_the_same_steps", "flex_attention_has_the_gradient_of_plain_attention"])
def test_what_is_compiled(check: str, tmp_path: Path):
    run_unchecked(check, DEVICE, cache=tmp_path)


RUNS: dict[str, dict[str, object]] = {
    "paper": {"losses": PAPER},
    "graph": {"losses": PAPER, "cuda_graph": True},
    "robust": ROBUST,
    "robust, persistent": STEPS["persistent sources"],
}


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS)
def test_a_run_goes_on_in_the_same_bytes(fields: dict[str, object], tmp_path: Path):
    config = tiny_with(**fields, device=DEVICE, checkpoint={"every": 4, "keep_last": 9})
    whole = decompose_config(config, out=tmp_path / "whole").path
    shutil.copytree(whole, copy := tmp_path / "copy")
    for folder in checkpoints(copy):
        if int(folder.name.removeprefix("step-")) > 8:
            shutil.rmtree(folder)
    assert open_run(decompose_config(config, out=copy, resume=True).path).status == "finished"
    for name in ("components", "importance", "optimizer", "rng"):
        last = f"checkpoints/step-00000012/{name}.safetensors"
        assert (copy / last).read_bytes() == (whole / last).read_bytes()
    assert (copy / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_run_is_read_on_both_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The circuit of a run made on a GPU: there, and where there is none."""
    path = decompose_config(tiny_with(**ROBUST, device=DEVICE), out=tmp_path / "run").path
    run = open_run(path)
    assert run.decomposition.device.type == DEVICE
    here = circuit(run, batches=1, adversary=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    there = open_run(path)
    assert there.decomposition.device.type == "cpu"
    elsewhere = circuit(there, batches=1, adversary=4)
    assert here.metrics.keys() == elsewhere.metrics.keys()
    for name in ("recon", "recon_layerwise", "faithfulness"):  # without noise, which is a device's own
        assert here.metrics[name] == pytest.approx(elsewhere.metrics[name], rel=1e-2, abs=1e-6)
    for site, expected in elsewhere.sites.items():
        assert here.sites[site].active == pytest.approx(expected.active, abs=0.5)


def test_a_language_model_is_decomposed_and_edited(tmp_path: Path):
    run = decompose_config(make_config(TINY_FACTS | {"device": DEVICE}), out=tmp_path / "run")
    assert run.decomposition.device.type == DEVICE
    assert inspect_prompt(run, "Tiger Woods plays the sport of golf").tokens
    edit = suppress(run, subcomponents=[(run.decomposition.names[0], 0)])
    assert evaluate_edit(run, edit, "Tiger Woods plays the sport of golf", controls=("activation read",)).controls


def test_products_in_tf32_are_close_and_not_the_same():
    x, y = (torch.randn(256, 256, generator=generator(name)).to(DEVICE) for name in ("x", "y"))
    with machine(tiny_with(matmul="fp32")):
        exact = x @ y
    with machine(tiny_with(matmul="tf32")):
        coarse = x @ y
    assert not exact.equal(coarse)
    torch.testing.assert_close(coarse, exact, rtol=0, atol=0.2)
