"""Training steps of the toy, without a run directory; and checks that need a process of their own."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import tiny_with
from paramlens.baselines import bench
from paramlens.errors import DivergedError
from paramlens.kernels import native
from paramlens.kernels.flex import FLEX_LENGTH
from paramlens.kernels.machine import machine
from paramlens.method.batch import Batch
from paramlens.method.decomposition import Decomposition
from paramlens.method.generators import generator
from paramlens.method.importance import attention
from paramlens.method.importance.network import Importance
from paramlens.method.importance.settings import Gamma
from paramlens.method.sites import find_sites
from paramlens.method.start import initialise
from paramlens.method.step import Steps
from paramlens.runs.train import make_optimizer
from paramlens.tasks.induction.model import InductionTransformer
from paramlens.tasks.induction.sequences import induction_task
from rounding import TOY_STEP, bound


def make(**fields: object) -> Steps:
    """The steps of the tiny configuration with fields replaced, on its device. Signs of singular vectors are a device's own."""
    config = tiny_with(**fields)
    torch.manual_seed(5)
    dtype = getattr(torch, config.dtype)
    model = InductionTransformer(config.task).to(config.device, dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sites = find_sites(model, config.sites)
    decomposition = Decomposition(model, sites, C=config.C, dtype=dtype, delta=config.delta)
    initialise(decomposition, config.init, generator=generator("init"))
    importance = Importance({site.name: (site.d_seen, config.C) for site in sites}, config.gamma, max_length=config.task.length)
    importance.initialise(generator("gamma"))
    importance.to(config.device, dtype)
    task = induction_task(config.task, model, seed=0, batch=config.batch)
    return Steps(config, task, decomposition, importance, make_optimizer(config, decomposition, importance))


def parameters(steps: Steps) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in steps.parameters]


def batch(steps: Steps, step: int) -> Batch:
    return steps.task.batch(step, "train").to(steps.config.device)


def no_update_follows_a_broken_gradient(steps: Steps) -> None:
    """Of steps that do not wait: from the one whose gradient is not finite on, the optimizer skips, and the next look tells."""
    for i in range(2):
        steps.require_finite(steps(batch(steps, i), i), i)
    before = parameters(steps)
    hook = steps.decomposition.V["blocks.0.attn.v"].register_hook(lambda gradient: gradient * math.nan)
    steps(batch(steps, 2), 2)
    hook.remove()
    result = steps(batch(steps, 3), 3)
    assert all(torch.equal(mine, other) for mine, other in zip(parameters(steps), before, strict=True))
    with pytest.raises(DivergedError, match=r"^by step 3: a gradient is not finite"):
        steps.require_finite(result, 3)


def run_unchecked(function: str, *words: str, cache: Path) -> None:
    """Run a function of this file in a process without the tests' type checks, which torch.compile does not look through."""
    code = (
        "import sys, jaxtyping; jaxtyping.install_import_hook = lambda *_: None\n"
        "sys.path.insert(0, sys.argv[1]); import toy_steps\n"
        "getattr(toy_steps, sys.argv[2])(*sys.argv[3:])"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), function, *words]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compiled_steps_are_the_same_steps(device: str) -> None:
    """Also: once each function has seen its shapes, nothing is compiled again."""
    native.serves = lambda *_: False  # as on a GPU
    losses: list[list[float]] = []
    for compiled in (False, True):
        case = bench.Case(length=6, batch=3, C=5, threads=1, compile=compiled, device=device)
        with machine(case.config()):
            step = bench.training(case.config(), "ours")
            losses.append([step(i).total.item() for i in range(3)])
            torch._dynamo.config.error_on_recompile = compiled
            losses[-1].append(step(3).total.item())
    for plain, fused in zip(*losses, strict=True):
        assert abs(plain - fused) < bound(TOY_STEP, 1) * plain, losses


def flex_attention_has_the_gradient_of_plain_attention(device: str) -> None:
    """γ of sequences that are long enough for it: values and gradients, with rows of padding."""
    n = FLEX_LENGTH
    importance = Importance({"a": (16, 4), "b": (16, 4)}, Gamma(kind="attention", d_gate=3), max_length=n)
    importance.initialise(generator("γ"))
    importance.to(device)
    x = {name: torch.randn(2, n, 16, generator=generator(name)).to(device) for name in ("a", "b")}
    U = {name: torch.randn(16, 4, generator=generator("U", name)).to(device) for name in ("a", "b")}
    present = (torch.arange(n) >= torch.tensor([[0], [5]])).to(device)
    found: list[list[torch.Tensor]] = []
    for shortest in (n, n + 1):
        attention.FLEX_LENGTH = shortest
        importance.zero_grad()
        pre = torch.stack(list(importance(x, U, present).values()))[:, present]
        pre.square().mean().backward()
        found.append([pre.detach(), *(each.grad.clone() for each in importance.parameters() if each.grad is not None)])
    for flex, plain in zip(*found, strict=True):
        torch.testing.assert_close(flex, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())
