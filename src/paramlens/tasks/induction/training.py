"""Train the target of the induction task and measure it during training (§5.1, Table 3, Figure 5)."""

import fnmatch
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paramlens.errors import ConfigError, DivergedError
from paramlens.method.generators import generator
from paramlens.method.hooks import hooked
from paramlens.method.task import TargetHistory
from paramlens.tasks.base import OnCheck, OnGivenUp
from paramlens.tasks.induction.model import InductionTransformer
from paramlens.tasks.induction.sequences import S1, M, induction_batch
from paramlens.tasks.induction.task import InductionCheck, InductionTask, TargetTraining


@torch.no_grad()
def check_target(model: InductionTransformer, task: InductionTask, *, seed: int, step: int, batch: int = 1024) -> InductionCheck:
    """Measure loss, accuracy and attention on `batch` held-out sequences."""
    held_out = induction_batch(task, seed=seed, stream="target-check", step=0, batch=batch).to(model.unembed.weight.device)
    roles, answers = held_out.roles, held_out.answers
    assert roles is not None
    assert answers is not None
    with _patterns(model) as patterns:
        logits = model(held_out.inputs)[:, -1]
    row = torch.arange(batch)
    s1, m = (roles == S1).int().argmax(1), (roles == M).int().argmax(1)
    return InductionCheck(
        step=step,
        loss=F.cross_entropy(logits, answers).item(),
        accuracy=(logits.argmax(-1) == answers).double().mean().item(),
        attention_m_s1=patterns[0][row, :, m, s1].mean(0).max().item(),
        attention_s2_m=patterns[-1][row, :, -1, m].mean(0).max().item(),
    )


@contextmanager
def _patterns(model: InductionTransformer) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    modules = [module for name, module in model.named_modules() if name.endswith(".pattern")]
    with hooked([(module, lambda _module, _args, _kwargs, pattern: seen.append(pattern)) for module in modules]):
        yield seen


def train_target(
    task: InductionTask,
    *,
    seed: int,
    device: str = "cpu",
    on_check: OnCheck = lambda _: None,
    on_given_up: OnGivenUp = lambda _attempt, _last: None,
) -> tuple[InductionTransformer, TargetHistory]:
    """Train the target with a loss on the answer alone (§5.1, Table 3).

    With `settle`, the learning rate stays constant until a check reaches `settle_accuracy`; then it decays to 0 and the attempt ends. An
    attempt with too few steps left to settle is given up, and `on_given_up` gets its number and last check if another one follows. If no
    attempt converges, the last target is returned with `converged` false.
    """
    attempt = 0
    while True:
        model, checks = _attempt(task, seed=seed, attempt=attempt, device=device, on_check=on_check)
        attempt += 1
        converged = _converged(checks[-1], task.training)
        if converged or attempt == task.training.attempts:
            return model, TargetHistory(tuple(checks), converged=converged, attempts=attempt)
        on_given_up(attempt, checks[-1])


def _attempt(
    task: InductionTask, *, seed: int, attempt: int, device: str, on_check: OnCheck
) -> tuple[InductionTransformer, list[InductionCheck]]:
    training = task.training
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(seed, "target", attempt).initial_seed())
        model = InductionTransformer(task).to(device)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[training.optimizer]
    optimizer = kind(_decayed(model, training), lr=training.lr)
    warmup = training.warmup if training.warmup >= 1 else training.warmup * training.steps
    checks: list[InductionCheck] = []
    end, settling = training.steps, False
    for step in range(training.steps):
        rate = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if settling:
            rate *= 0.5 * (1 - math.cos(math.pi * (end - step) / training.settle))
        for group in optimizer.param_groups:
            group["lr"] = training.lr * rate
        logits, answers = _training_logits(model, task, seed=seed, attempt=attempt, step=step, device=device)
        loss = F.cross_entropy(logits, answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = step + 1
        if done % training.check_every == 0 or done == end:
            check = check_target(model, task, seed=seed, step=done)
            if not math.isfinite(check.loss):
                raise DivergedError(f"target step {done}: loss is {check.loss}; lower task.training.lr ({training.lr:g})")
            checks.append(check)
            on_check(check)
            if done == end or (training.settle and not settling and done + training.settle > training.steps):
                break
            if training.settle and not settling and done >= training.settle_from and check.accuracy >= training.settle_accuracy:
                settling, end = True, done + training.settle
    return model, checks


def _decayed(model: InductionTransformer, training: TargetTraining) -> list[dict[str, Any]]:
    """The optimizer's parameter groups, with and without weight decay. Raises `ConfigError` for a pattern that matches no parameter."""
    free: set[str] = set()
    for pattern in training.undecayed:
        named = fnmatch.filter((name for name, _ in model.named_parameters()), pattern)
        if not named:
            raise ConfigError(f"task.training.undecayed: {pattern!r} names no parameter of the target")
        free.update(named)
    return [
        {"params": [value for name, value in model.named_parameters() if name not in free], "weight_decay": training.weight_decay},
        {"params": [value for name, value in model.named_parameters() if name in free], "weight_decay": 0.0},
    ]


def _training_logits(
    model: InductionTransformer, task: InductionTask, *, seed: int, attempt: int, step: int, device: str
) -> tuple[Tensor, Tensor]:
    training = task.training
    curriculum = step < training.window_steps
    length = (training.window if curriculum else None) or task.length
    offset = int(torch.randint(task.length - length + 1, (1,), generator=generator(seed, "window", attempt, step)))
    batch = induction_batch(
        task, seed=seed, stream=f"target-{attempt}", step=step, batch=training.batch, length=length, early=curriculum
    ).to(device)
    assert batch.answers is not None
    return model(batch.inputs, offset=offset, last_token_only=True)[:, -1], batch.answers


def _converged(check: InductionCheck, training: TargetTraining) -> bool:
    return check.loss <= training.converged_loss and check.accuracy >= training.converged_accuracy
