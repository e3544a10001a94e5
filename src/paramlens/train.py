"""Algorithm 3: learn U, V and γ so that the masked model stays the target with as few subcomponents as possible."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paramlens.config import RECONSTRUCTION_NAMES, Config, Optim
from paramlens.decomposition import Decomposition
from paramlens.errors import DivergedError, RunInterrupted
from paramlens.evaluation import active_counts, evaluate, importances
from paramlens.importance import Importance, lower
from paramlens.losses import annealed_p, faithfulness, minimality, reconstruction_losses
from paramlens.rundir import CheckpointState, RunDirectory, load_parameters, load_state
from paramlens.tasks import Inputs, Task, generator
from paramlens.tracking import LoggedStep, Tracker


@dataclass(frozen=True)
class Step:
    """One training step before the update: losses by name, their weighted sum, and what they were computed from."""

    losses: dict[str, Tensor]
    total: Tensor
    p: float
    pre: dict[str, Tensor]
    g: dict[str, Tensor]
    target_logits: Tensor


def training_step(config: Config, task: Task, decomposition: Decomposition, importance: Importance, inputs: Inputs, step: int) -> Step:
    """Lines 2 to 9 of Algorithm 3 on one minibatch."""
    losses = config.losses
    target = decomposition.target_run(inputs)  # 2: run the original model
    pre = importance(target.inputs, decomposition.U)  # 3: causal importances on this batch
    g = {name: lower(value) for name, value in pre.items()}
    device = target.logits.device
    total, values = reconstruction_losses(  # 4, 5, 8: masks, masked runs, divergences
        decomposition,
        task.loss_inputs(inputs, last_token_only=config.last_token_only),
        target,
        g,
        {name: getattr(losses, name) for name in RECONSTRUCTION_NAMES if getattr(losses, name)},
        last_token_only=config.last_token_only,
        samples=losses.samples,
        partial_scope=losses.partial_scope,
        generator=lambda name: generator(config.seed, "masks", name, step, device=device),
    )
    p = annealed_p(losses, step, config.steps)
    others: dict[str, Tensor] = {}
    if losses.faithfulness:
        others["faithfulness"] = faithfulness(decomposition)
    if losses.minimality:
        others["minimality"] = minimality(pre, p=p, eps=losses.minimality_eps)
    for name, value in others.items():
        total = total + getattr(losses, name) * value
        values[name] = value.detach()
    return Step(values, total, p, pre, g, target.logits)


def make_optimizer(config: Config, decomposition: Decomposition, importance: Importance) -> torch.optim.Optimizer:
    """Adam or AdamW over U and V, γ, and γ's relative encodings; each group holds its full rate, which the schedule scales."""
    optim = config.optim
    gamma_lr = optim.gamma_lr or optim.lr
    relative = [value for name, value in importance.named_parameters() if name.endswith("relative")]
    others = [value for name, value in importance.named_parameters() if not name.endswith("relative")]
    groups = [
        {"params": list(decomposition.parameters()), "full_lr": optim.lr},
        {"params": others, "full_lr": gamma_lr},
        {"params": relative, "full_lr": gamma_lr * config.gamma.relative_lr},
    ]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optim.name]
    return kind([group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)


def rate(optim: Optim, step: int, steps: int) -> float:
    """Share of the full learning rate at `step`, in (0, 1]: linear warm-up, then the schedule over what is left."""
    warmup = optim.warmup if optim.warmup >= 1 else optim.warmup * steps
    if step < warmup:
        return (step + 1) / (math.floor(warmup) + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress}[optim.schedule]


def train(
    config: Config,
    task: Task,
    decomposition: Decomposition,
    importance: Importance,
    optimizer: torch.optim.Optimizer,
    directory: RunDirectory,
    *,
    start: int,
    tracker: Tracker,
) -> None:
    """The loop of Algorithm 3 from step `start`, with logging, evaluation and checkpoints in `directory`.

    Raises `DivergedError` before an update with a value that is not finite, and `RunInterrupted` after a Ctrl-C, once the step
    under way is finished and saved.
    """
    began = time.monotonic()
    before = directory.info["seconds"]
    tracker.start("decomposing", steps=config.steps, done=start)
    save = partial(_save, config, decomposition, importance, optimizer, directory)
    status, done = "failed", start
    try:
        with interrupts() as interrupted:
            for step in range(start, config.steps):
                share = rate(config.optim, step, config.steps)
                for group in optimizer.param_groups:
                    group["lr"] = group["full_lr"] * share
                batch = task.batch(step, "train").to(config.device)  # 1
                result = training_step(config, task, decomposition, importance, batch.inputs, step)  # 2 to 9
                optimizer.zero_grad()
                result.total.backward()
                _require_finite(result, decomposition, importance, step)
                optimizer.step()  # 10
                done = step + 1
                last = done == config.steps
                if done % config.log_every == 0 or last:
                    _log(config, result, done, share, directory, tracker)
                if done % config.evaluate.every == 0 or last:
                    directory.append_metrics({"step": done, "evaluation": held_out(config, task, decomposition, importance)})
                stop = interrupted()
                if done % config.checkpoint.every == 0 or last or stop:
                    save(done)
                if stop and not last:
                    raise RunInterrupted
        status = "finished"
    except DivergedError:
        status = "diverged"
        raise
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        tracker.close()
        directory.record(status=status, steps=done, seconds=round(before + time.monotonic() - began, 3))


def held_out(config: Config, task: Task, decomposition: Decomposition, importance: Importance) -> dict[str, float]:
    """Metrics of `evaluation.evaluate`, mean over `evaluate.batches` held-out batches."""
    rows = []
    for index in range(config.evaluate.batches):
        batch = task.batch(index, "evaluate").to(decomposition.device)
        target, g = importances(decomposition, importance, batch)
        rows.append(evaluate(task, decomposition, batch, target, g, last_token_only=config.last_token_only, seed=config.seed))
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _log(config: Config, result: Step, done: int, share: float, directory: RunDirectory, tracker: Tracker) -> None:
    logged = LoggedStep(
        step=done,
        losses={name: value.item() for name, value in result.losses.items()},
        total=result.total.item(),
        p=result.p,
        lr=config.optim.lr * share,
        active=active_counts(result.g),
    )
    directory.append_metrics(
        {"step": done, "losses": logged.losses, "total": logged.total, "p": logged.p, "lr": logged.lr, "active": logged.active}
    )
    tracker.update(logged)


def _require_finite(result: Step, decomposition: Decomposition, importance: Importance, step: int) -> None:
    """Raise `DivergedError` naming the loss and the site if anything about to enter the update is not finite."""
    parameters = [*decomposition.parameters(), *importance.parameters()]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if torch.isfinite(result.total) and torch.isfinite(norm):
        return

    def broken(tensors: Mapping[str, Tensor | None]) -> str:
        names = [name for name, value in tensors.items() if value is not None and not torch.isfinite(value).all()]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    gradients = {f"U at {name}": U.grad for name, U in decomposition.U.items()}
    gradients |= {f"V at {name}": V.grad for name, V in decomposition.V.items()}
    for group in importance.typed_groups:
        for i, site in enumerate(group.names):
            gradients |= {f"γ's {key} at {site}": value.grad[i] for key, value in group.named_parameters() if value.grad is not None}
    losses = broken(result.losses)
    causes = [
        ("the target's", broken({"logits": result.target_logits})),
        ("U at", broken(decomposition.U)),
        ("V at", broken(decomposition.V)),
        ("γ's pre-activation at", broken(result.pre)),
        ("the gradient of", broken(gradients)),
    ]
    where = next((f"{what} {names}" for what, names in causes if names), "every site finite")  # the first is the origin
    raise DivergedError(
        f"step {step}: {'loss ' + losses if losses else 'a gradient'} is not finite ({where}); nothing was updated. "
        "Lower optim.lr and start anew; the last checkpoint is from before"
    )


def _save(
    config: Config,
    decomposition: Decomposition,
    importance: Importance,
    optimizer: torch.optim.Optimizer,
    directory: RunDirectory,
    step: int,
) -> None:
    moments = {
        f"{index}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    state = CheckpointState(step=step, optimizer=moments, rng={"torch": torch.get_rng_state()})
    directory.save_checkpoint(decomposition, importance, state, keep_last=config.checkpoint.keep_last)


def restore(folder: Path, decomposition: Decomposition, importance: Importance, optimizer: torch.optim.Optimizer) -> int:
    load_parameters(folder, decomposition, importance)
    state = load_state(folder)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in state.optimizer.items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(state.rng["torch"])
    return state.step


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag, so that the step under way can finish; a second one interrupts at once."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield lambda: False
        return
    seen = threading.Event()

    def handler(_number: int, _frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        seen.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, before)
