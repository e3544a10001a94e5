"""One training step, and a whole run, beside the code published with the method (goodfire-ai/spd): same target, sizes, losses and start.

    python benchmarks/beside_published.py step SPD              # about 4 minutes of one core; Markdown
    python benchmarks/beside_published.py run SPD [STEPS]       # both for so many steps, by default 1500: about half an hour
    python benchmarks/beside_published.py profile [LENGTH]      # where our step's time goes

SPD is a copy of https://github.com/goodfire-ai/spd; measured with commit 3f0bb61. It needs Python 3.13, ParamLens, and of that code's
requirements einops, fire, matplotlib, python-dotenv, sympy, torchvision and wandb; datasets and wandb-workspaces may be missing.

Before anything is timed, both steps are done once from the same parameters on the same batch with the same noise, and their losses and
gradients are printed side by side. Then they alternate in one process, on one thread, each with its own noise and update.
"""

import copy
import cProfile
import json
import os
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from paper_form import PAPER_FORM
from torch import Tensor

from paramlens import decompose_config, load_config
from paramlens.baselines.bench import Case, _processor, beginning
from paramlens.config.model import Config
from paramlens.kernels.machine import machine
from paramlens.method.batch import Batch
from paramlens.method.decomposition import Decomposition
from paramlens.method.evaluate import active_counts, evaluate, importances
from paramlens.method.generators import generator
from paramlens.method.importance.network import Importance
from paramlens.method.losses.minimality import annealed_p
from paramlens.method.masks import mask_noise
from paramlens.method.step import Steps, training_step
from paramlens.method.task import Task
from paramlens.runs.target_training import train_target
from paramlens.runs.train import make_optimizer, rate

KINDS = {"scalar": "mlp", "vector": "vector_mlp"}
"""Our kind of γ → theirs."""
LENGTHS = (16, 64)
REPEATS, WARM = 15, 2
UNUSED = ("datasets", "wandb_workspaces.reports.v2", "wandb_workspaces.workspaces")
"""Modules that the published code imports and a step does not use."""
RECIPE = PAPER_FORM | {
    "gamma.kind": "vector",
    "losses.recon_layerwise": 0.0,
    "evaluate.every": 10_000,
    "checkpoint.every": 10_000,
    "log_every": 100,
}
"""What differs from induction-quick in both runs: a γ and losses that both codes have."""
OURS = {"delta": True, "merge.every": 50, "losses.faithfulness": 0.0}
"""What differs in our run alone: Δ is a component, so that U V + Δ is W, and dead subcomponents are merged into it."""


class Published:
    """The published training step, with its own model, losses and optimizer, from the first values of a decomposition of ours."""

    def __init__(self, config: Config, decomposition: Decomposition, importance: Importance) -> None:
        self.config, self.losses = config, config.losses
        target = copy.deepcopy(decomposition.model)
        if config.last_token_only:
            target.register_forward_hook(lambda _module, _args, logits: logits[:, -1:])
        models, paths = import_module("spd.models.component_model"), import_module("spd.utils.module_utils")
        self.model = models.ComponentModel(
            target_model=target,
            module_path_info=[paths.ModulePathInfo(name, C) for name, C in decomposition.C.items()],
            ci_fn_type=KINDS[config.gamma.kind],
            ci_fn_hidden_dims=[config.gamma.d_gate],
            sigmoid_type="leaky_hard",
            pretrained_model_output_attr=None,
        )
        self.metrics = {name: getattr(import_module(f"spd.metrics.{name}"), name) for name in _METRICS}
        with torch.no_grad():
            for theirs, ours in self.pairs(decomposition.U, decomposition.V, importance.site_parameters()):
                theirs.copy_(ours.view_as(theirs))
        optim = config.optim
        gamma_lr = optim.gamma_lr or optim.lr
        self.groups = [(self.model._components, optim.lr), (self.model._ci_fns, gamma_lr)]
        groups = [{"params": list(module.parameters()), "lr": lr} for module, lr in self.groups]
        self.optimizer = torch.optim.AdamW(groups, betas=optim.betas, weight_decay=0)

    def pairs(
        self, U: Mapping[str, Tensor], V: Mapping[str, Tensor], gamma: Mapping[str, Mapping[str, Tensor]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Their parameters, and what ours have in the same place (values or gradients). Their V reads and their U writes."""
        for name in U:
            components, network = self.model.components[name], self.model.ci_fns[name].layers
            parameters = (components.V, components.U, network[0].W, network[0].b, network[2].W, network[2].b)
            yield from zip(parameters, (U[name], V[name], *gamma[name].values()), strict=True)

    def write(self, decomposition: Decomposition, importance: Importance) -> None:
        """Copy their parameters into ours."""
        with torch.no_grad():
            for theirs, ours in self.pairs(decomposition.U, decomposition.V, importance.site_parameters()):
                ours.copy_(theirs.view_as(ours))

    def values(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The losses of a batch by our names, as the published loop computes them."""
        tokens, model, metrics = batch.inputs, self.model, self.metrics
        out = model(tokens, cache_type="input")
        ci = model.calc_causal_importances(pre_weight_acts=out.cache, sampling="continuous", detach_inputs=False)
        known = {"model": model, "output_loss_type": "kl", "batch": tokens, "target_out": out.output, "ci": ci.lower_leaky}
        stochastic = {"sampling": "continuous", "n_mask_samples": self.losses.samples, "weight_deltas": None}
        return {
            "stochastic_recon": metrics["stochastic_recon_loss"](**known, **stochastic),
            "stochastic_recon_layerwise": metrics["stochastic_recon_layerwise_loss"](**known, **stochastic),
            "recon": metrics["ci_masked_recon_loss"](**known),
            "faithfulness": metrics["faithfulness_loss"](model.calc_weight_deltas()),
            "minimality": metrics["importance_minimality_loss"](
                ci_upper_leaky=ci.upper_leaky,
                pnorm=annealed_p(self.losses, step, self.config.steps),
                eps=self.losses.minimality_eps,
                beta=0.0,
                current_frac_of_training=0.0,
                p_anneal_start_frac=1.0,
                p_anneal_final_p=None,
                p_anneal_end_frac=1.0,
            ),
        }

    def gradients(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The losses, and the gradients of their weighted sum in `.grad` of all parameters."""
        self.optimizer.zero_grad()
        losses = self.values(batch, step)
        torch.stack([getattr(self.losses, name) * value for name, value in losses.items()]).sum().backward()
        return losses

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One whole step, with the update."""
        share = rate(self.config.optim, step, self.config.steps)
        for group, (_, lr) in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = share * lr
        losses = self.gradients(batch, step)
        self.optimizer.step()
        return losses


_METRICS = (
    "stochastic_recon_loss",
    "stochastic_recon_layerwise_loss",
    "ci_masked_recon_loss",
    "faithfulness_loss",
    "importance_minimality_loss",
)


def find_published(repository: str) -> None:
    """Make the published code importable; what it needs for other work than a step may be missing."""
    if not (Path(repository) / "spd" / "models").is_dir():
        raise SystemExit(f"{repository}: has no folder spd/models; give a copy of https://github.com/goodfire-ai/spd")
    sys.path.insert(0, str(Path(repository).resolve()))
    for name in UNUSED:
        package = name.split(".")[0]
        if isinstance(sys.modules.get(package), MagicMock) or find_spec(package) is None:
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                sys.modules.setdefault(".".join(parts[:end]), MagicMock())


@contextmanager
def noise_of(config: Config, g: Mapping[str, Tensor], step: int) -> Iterator[None]:
    """While active, `torch.rand_like` gives the published step the noise that ours draws at `step`."""
    drawn = []
    for loss in ("stochastic_recon", "stochastic_recon_layerwise"):
        keys = torch.randint(2**31, (len(g),), generator=generator(config.seed, "masks", loss, step)).tolist()
        drawn += [mask_noise(key, value) for key, value in zip(keys, g.values(), strict=True)]
    noise = iter(drawn)
    with patch.object(torch, "rand_like", lambda like: next(noise).view_as(like)):
        yield


def compared(config: Config, task: Task, decomposition: Decomposition, importance: Importance, theirs: Published) -> dict[str, Any]:
    """The losses of both steps with the same parameters, batch and noise, and the largest difference of a gradient.

    gradients: max |theirs - ours| / max |ours| of each tensor, the largest of all tensors. Parameters are left as they are.
    """
    batch = task.batch(0, "train")
    ours = training_step(config, task, decomposition, importance, batch, 0)
    with noise_of(config, ours.g, 0):
        published = theirs.gradients(batch, 0)
    U, V = ({name: _gradient(value) for name, value in each.items()} for each in (decomposition.U, decomposition.V))
    gamma: dict[str, dict[str, Tensor]] = {name: {} for name in decomposition.names}
    for group in importance.typed_groups:
        for key, parameter in group.named_parameters():
            for name, gradient in zip(group.names, _gradient(parameter), strict=True):
                gamma[name][key] = gradient
    pairs = [(_gradient(parameter).view_as(mine), mine) for parameter, mine in theirs.pairs(U, V, gamma)]
    for parameter in (*decomposition.parameters(), *importance.parameters()):
        parameter.grad = None
    losses = {name: (published[name].item(), value.item()) for name, value in ours.losses.items()}
    return {"losses": losses, "gradients": max(((other - mine).abs().max() / mine.abs().max()).item() for other, mine in pairs)}


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def alternating(steps: Mapping[str, Callable[[Batch, int], object]], task: Task, repeats: int = REPEATS) -> dict[str, list[list[float]]]:
    """Of each side, seconds on the clock and of this thread's processor time, of every step; the sides take turns."""
    taken: dict[str, list[list[float]]] = {side: [[], []] for side in steps}
    for i in range(repeats + WARM):
        batch = task.batch(i, "train")
        for side, step in steps.items():
            start = time.perf_counter(), time.thread_time()
            step(batch, i)
            if i >= WARM:
                taken[side][0].append(time.perf_counter() - start[0])
                taken[side][1].append(time.thread_time() - start[1])
    return taken


def step(repository: str) -> None:
    """One training step of each, for both kinds of γ and both lengths."""
    find_published(repository)
    checks, rows = list[str](), list[str]()
    for kind in KINDS:
        for length in LENGTHS:
            config = Case(importance=kind, length=length, threads=1).config()
            with machine(config):
                task, decomposition, importance = beginning(config)
                _disturb(decomposition)
                decomposition.find_blocks(task.batch(0, "train").inputs)
                theirs = Published(config, decomposition, importance)
                found = compared(config, task, decomposition, importance, theirs)
                own = Steps(config, task, decomposition, importance, make_optimizer(config, decomposition, importance))
                taken = alternating({"theirs": theirs, "ours": own}, task)
            names = f"| {kind} | {length} |"
            checks += [f"{names} {name} | {published:.6g} | {ours:.6g} | |" for name, (published, ours) in found["losses"].items()]
            checks.append(f"{names} all gradients | | | {found['gradients']:.0e} |")
            figures = [f"{statistics.median(taken[side][clock]):.3f}" for side in ("theirs", "ours") for clock in (0, 1)]
            for clock in (0, 1):
                ratios = sorted(a / b for a, b in zip(taken["theirs"][clock], taken["ours"][clock], strict=True))
                quarter = len(ratios) // 4
                figures.append(f"{statistics.median(ratios):.2f} ({ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f})")
            rows.append(f"{names} {' | '.join(figures)} |")
            print(rows[-1], file=sys.stderr, flush=True)
    print(f"Machine: {_processor()}, torch {torch.__version__}, one thread; load {os.getloadavg()[0]:.1f}\n")
    print("Seconds a step, medians; ratio of each pair of steps, median and middle half.\n")
    print("| γ | length | theirs | processor | ours | processor | ratio | of processor times |\n|---|---:|---:|---:|---:|---:|---:|---:|")
    print("\n".join(rows))
    print("\nSame parameters, batch and noise, before anything is timed. Difference: the largest of a gradient, relative to its maximum.\n")
    print("| γ | length | loss | theirs | ours | difference |\n|---|---:|---|---:|---:|---:|")
    print("\n".join(checks))


@torch.no_grad()
def _disturb(decomposition: Decomposition) -> None:
    """Move U and V away from U V = W, so that faithfulness and its gradient are no rounding errors."""
    rng = generator("disturb")
    for parameter in decomposition.parameters():
        parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=rng)


def run(repository: str, steps: int = 1500) -> None:
    """Both codes for as many steps on the target of induction-quick: seconds, and what they reach on the same held-out batches."""
    find_published(repository)
    with tempfile.TemporaryDirectory() as folder:
        shared: dict[str, Any] = {**RECIPE, "steps": steps}
        config = load_config("induction-quick", overrides=shared)
        train_target(config, out=Path(folder) / "target")
        target = Path(folder) / "target"
        warm = {**shared, **OURS, "steps": 2}
        decompose_config(load_config("induction-quick", overrides=warm), out=Path(folder) / "warm", target=target)
        own = load_config("induction-quick", overrides={**shared, **OURS})
        began = time.perf_counter(), time.process_time()
        ours = decompose_config(own, out=Path(folder) / "ours", target=target)
        assert ours.task is not None
        rows = {"ours": {"seconds": time.perf_counter() - began[0], "processor": time.process_time() - began[1]}}
        rows["ours"] |= reached(own, ours.task, ours.decomposition, ours.importance)
        print(json.dumps(rows["ours"]), file=sys.stderr, flush=True)
        with machine(config):
            task, decomposition, importance = beginning(config, ours.task.model)
            theirs = Published(config, decomposition, importance)
            torch.manual_seed(0)
            began = time.perf_counter(), time.process_time()
            for i in range(steps):
                losses = theirs(task.batch(i, "train"), i)
                if (i + 1) % 100 == 0:
                    print(i + 1, {name: f"{value.item():.4g}" for name, value in losses.items()}, file=sys.stderr, flush=True)
            rows["theirs"] = {"seconds": time.perf_counter() - began[0], "processor": time.process_time() - began[1]}
            theirs.write(decomposition, importance)
            rows["theirs"] |= reached(config, task, decomposition, importance)
    print(f"Machine: {_processor()}, torch {torch.__version__}, one thread; {steps} steps; load: {os.getloadavg()[0]:.1f}\n")
    names = list(rows["ours"])
    print(f"| | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for side, row in rows.items():
        print(f"| {side} | {' | '.join(f'{row[name]:.4g}' for name in names)} |")


@torch.no_grad()
def reached(config: Config, task: Task, decomposition: Decomposition, importance: Importance, batches: int = 8) -> dict[str, float]:
    """Metrics of a decomposition, means over held-out batches, with the number of subcomponents active at a position, of all sites."""
    found: list[dict[str, float]] = []
    for i in range(batches):
        batch = task.batch(i, "eval")
        target, g = importances(decomposition, importance, batch)
        metrics = evaluate(task, decomposition, batch, target, g, last_token_only=config.last_token_only)
        found.append(metrics | {"active": sum(active_counts(g).values())})
    left = {"C left": sum(decomposition.C.values()) / len(decomposition.C)}
    return {name: statistics.mean(each[name] for each in found) for name in found[0]} | left


def profile(length: int = 64, kind: str = "vector", repeats: int = 10) -> None:
    """The functions in which our step spends its time, by their own time."""
    config = Case(importance=kind, length=length, threads=1).config()
    with machine(config):
        task, decomposition, importance = beginning(config)
        decomposition.find_blocks(task.batch(0, "train").inputs)
        own = Steps(config, task, decomposition, importance, make_optimizer(config, decomposition, importance))
        own(task.batch(0, "train"), 0)
        recorder = cProfile.Profile()
        with recorder:
            for i in range(repeats):
                own(task.batch(i, "train"), i)
    stats = pstats.Stats(recorder)
    stats.sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    actions: dict[str, Callable[..., None]] = {"step": step, "run": run, "profile": profile}
    words = [int(word) if word.isdigit() else word for word in sys.argv[2:]]
    actions[sys.argv[1]](*words)
