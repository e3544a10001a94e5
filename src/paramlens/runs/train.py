"""Algorithm 3: learn U, V and γ so that the masked model behaves like the target with as few subcomponents as possible."""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paramlens.config.model import Config
from paramlens.errors import DivergedError, RunInterrupted
from paramlens.method.batch import Batch
from paramlens.method.decomposition import Decomposition
from paramlens.method.evaluate import active_counts, evaluate, importances, mean_over_batches
from paramlens.method.generators import seed_of
from paramlens.method.importance.network import Importance
from paramlens.method.losses.divergence import LossAt
from paramlens.method.losses.smooth_minimality import annealed_width
from paramlens.method.merging import Merging
from paramlens.method.settings import Optim
from paramlens.method.sources import sources_of
from paramlens.method.step import Step, Steps
from paramlens.method.task import Task
from paramlens.runs.checkpoint import CheckpointState, load_parameters
from paramlens.runs.randomness import rng_state, set_rng_state
from paramlens.runs.saving import Saver
from paramlens.runs.writer import RunWriter
from paramlens.tracking.signals import interrupts
from paramlens.tracking.tracker import LoggedStep, Tracker


def make_optimizer(config: Config, decomposition: Decomposition, importance: Importance) -> torch.optim.Optimizer:
    """Adam or AdamW, with one group for U and V and one per learning rate of γ. The schedule scales each group's `full_lr`."""
    optim = config.optim
    gamma_lr = optim.gamma_lr or optim.lr
    groups: list[dict[str, Any]] = [{"params": list(decomposition.parameters()), "full_lr": optim.lr}]
    for factor, parameters in importance.by_lr_factor().items():
        groups.append({"params": parameters, "full_lr": gamma_lr * (1 if factor is None else factor)})
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optim.name]
    lr = torch.tensor(optim.lr, device=config.device) if config.cuda_graph else optim.lr
    for group in groups:
        group["lr"] = lr.clone() if isinstance(lr, Tensor) else lr
    fused = torch.device(config.device).type in ("cpu", "cuda")  # one pass over parameters, gradients and moments
    return kind(groups, betas=optim.betas, weight_decay=optim.weight_decay, fused=fused, capturable=config.cuda_graph)


def rate(optim: Optim, step: int, steps: int) -> float:
    """Share of the full learning rate at `step`, in (0, 1]: linear warm-up, then the schedule over the remaining steps."""
    warmup = optim.warmup if optim.warmup >= 1 else optim.warmup * steps
    if step < warmup:
        return (step + 1) / (math.floor(warmup) + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress}[optim.schedule]


class Learner:
    """What the steps of a run change, and what its checkpoints hold beside the random generators."""

    def __init__(self, config: Config, decomposition: Decomposition, importance: Importance) -> None:
        self.decomposition, self.importance = decomposition, importance
        self.optimizer = make_optimizer(config, decomposition, importance)
        self.sources = sources_of(config.adversary)
        self.merging = Merging(config.merge, config.steps, decomposition, importance, self.optimizer, sources=self.sources)


def train(config: Config, task: Task, learner: Learner, directory: RunWriter, *, start: int, tracker: Tracker) -> None:
    """The loop of Algorithm 3 from step `start`, with logging, evaluation and checkpoints in `directory`.

    Raises `DivergedError` before an update with a value that is not finite, `RunInterrupted` after a Ctrl-C or SIGTERM, when the current
    step is finished and saved, and `SaveError` if checkpoints cannot be written after several tries.
    """
    began = time.monotonic()
    before = directory.info["seconds"]
    tracker.start("decomposing", steps=config.steps, done=start, path=directory.path, config=config)
    decomposition, importance, optimizer, merging = learner.decomposition, learner.importance, learner.optimizer, learner.merging
    steps = Steps(config, task, decomposition, importance, optimizer, sources=learner.sources)
    saver = Saver(directory, every=config.checkpoint.every, message=tracker.message)
    longer = _LongerBatches(importance, tracker)
    status, done = "failed", start
    try:
        with interrupts() as interrupted:
            for step in range(start, config.steps):
                share = rate(config.optim, step, config.steps)
                set_rates(optimizer, share)
                batch = task.batch(step, "train").to(config.device)  # 1
                longer(batch, step)
                result = steps(batch, step)  # 2 to 10
                merging.after_step(step, result.g)
                done = step + 1
                last = done == config.steps
                log, measure = done % config.log_every == 0 or last, done % config.evaluate.every == 0 or last
                if log or measure:
                    steps.require_finite(result, step)
                if log:
                    saver.append(_logged(config, result, merging, done, share, batch, tracker))
                if measure:
                    saver.append(_evaluated(config, task, decomposition, importance, done, tracker))
                stop = interrupted()
                if saver.due(done) or last or stop:
                    steps.require_finite(result, step)
                    require_finite_parameters(decomposition, importance, done)
                    saver.save(partial(_save, config, learner, directory, done), done, now=bool(last or stop))
                if stop and not last:
                    raise RunInterrupted(stop)
        status = "finished"
    except DivergedError:
        status = "diverged"
        raise
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        try:
            saver.record(status=status, steps=done, seconds=round(before + time.monotonic() - began, 3))
        finally:
            tracker.close()  # after the status is written, as a tracker may wait here and be interrupted


class _LongerBatches:
    """Reports the first batch with more positions than γ's tables have."""

    def __init__(self, importance: Importance, tracker: Tracker) -> None:
        self.table, self.kind, self.tracker = importance.table_length, importance.gamma.kind, tracker

    def __call__(self, batch: Batch, step: int) -> None:
        if self.table is None or (batch.columns or 0) <= self.table:
            return
        self.tracker.message(
            f"step {step}: a batch of {batch.columns} positions; the {self.kind} γ's tables were sized for {self.table}, further positions "
            f"share their last entries. To give each its own, start with gamma.max_length {batch.columns}"
        )
        self.table = None


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group's learning rate to `share` of its full rate; in place if it is a tensor, which a captured step reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["full_lr"] * share)
        else:
            group["lr"] = group["full_lr"] * share


def held_out(config: Config, task: Task, decomposition: Decomposition, importance: Importance) -> dict[str, float]:
    """Metrics of `evaluation.evaluate`: mean over the loss positions of `evaluate.batches` held-out batches, or of all there are."""
    rows, counts = list[dict[str, float]](), list[int]()
    for index in range(min(config.evaluate.batches, task.held_out or config.evaluate.batches)):
        batch = task.batch(index, "evaluate").to(decomposition.device)
        target, g = importances(decomposition, importance, batch)
        seed = seed_of(config.seed, index)
        rows.append(evaluate(task, decomposition, batch, target, g, last_token_only=config.last_token_only, seed=seed))
        counts.append(LossAt(config.last_token_only, batch.present).count(target.logits))
    return {name: mean_over_batches([row[name] for row in rows], counts) for name in rows[0]}


def require_finite_parameters(decomposition: Decomposition, importance: Importance, step: int) -> None:
    """Raise `DivergedError` if a parameter is not finite after an update with finite gradients, so that it is not saved."""
    parts = {f"{kind} at {name}": value for kind in ("U", "V") for name, value in getattr(decomposition, kind).items()}
    parts |= {f"γ's {name}": value for name, value in importance.named_values().items()}
    if broken := [name for name, value in parts.items() if not torch.isfinite(value).all()]:
        raise DivergedError(
            f"step {step}: {', '.join(broken[:4])} is not finite after the update; nothing was saved. "
            "Lower optim.lr and start anew; the last checkpoint is from before"
        )


def _logged(config: Config, result: Step, merging: Merging, done: int, share: float, batch: Batch, tracker: Tracker) -> dict[str, Any]:
    """The line of metrics.jsonl for a logged step, which is also sent to the tracker."""
    logged = LoggedStep(
        step=done,
        losses={name: value.item() for name, value in result.losses.items()},
        total=result.total.item(),
        p=float(result.p),
        lr=config.optim.lr * share,
        active=active_counts(result.g, present=batch.present),
        width=annealed_width(config.smooth, done - 1, config.steps) if config.losses.smooth_minimality else None,
    )
    tracker.update(logged)
    left = {"left": merging.left()} if config.merge.every is not None else {}
    line = {"step": done, "losses": logged.losses, "total": logged.total, "p": logged.p, "lr": logged.lr, "active": logged.active}
    return line | left | ({} if logged.width is None else {"width": logged.width})


def _evaluated(
    config: Config, task: Task, decomposition: Decomposition, importance: Importance, done: int, tracker: Tracker
) -> dict[str, Any]:
    """The line of metrics.jsonl with the metrics of `held_out`, which are also sent to the tracker."""
    metrics = held_out(config, task, decomposition, importance)
    tracker.evaluated(done, metrics)
    return {"step": done, "evaluation": metrics}


def _save(config: Config, learner: Learner, directory: RunWriter, step: int) -> None:
    moments = {
        f"{index}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, state in learner.optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    if config.merge.every is not None:
        moments |= {f"{RECENT}{site}": value for site, value in learner.merging.recent.items()}
    moments |= {f"{SOURCES}{site}": value for site, value in learner.sources.kept.items()}
    directory.save_checkpoint(config, learner.decomposition, learner.importance, step=step, optimizer=moments, rng=rng_state(config.device))


RECENT = "recent."
"""Before a site's name: its running maxima, beside the optimizer's moments in a checkpoint."""
SOURCES = "sources."
"""Before a site's name: the adversary's persistent sources, in the same place."""


def restore(folder: Path, state: CheckpointState, learner: Learner) -> None:
    """Set U, V, γ, the optimizer, merging's running maxima, the adversary's sources and all random generators to those of a checkpoint."""
    decomposition, optimizer = learner.decomposition, learner.optimizer
    load_parameters(folder, decomposition, learner.importance)
    beside = {RECENT: learner.merging.recent, SOURCES: learner.sources.kept}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in state.optimizer.items():
        prefix = next((prefix for prefix in beside if name.startswith(prefix)), None)
        if prefix is not None:
            beside[prefix][name.removeprefix(prefix)] = value.to(decomposition.device)
            continue
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    set_rng_state(state.rng, str(decomposition.device))
