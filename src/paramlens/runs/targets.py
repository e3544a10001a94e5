"""The target of a configuration: resolve its paths, train it with messages, save it and load it."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from paramlens.config.model import Config
from paramlens.files.plain import read_json, write_json
from paramlens.method.task import TargetHistory
from paramlens.runs.layout import FORMAT
from paramlens.tasks.base import BaseTask, Target, TargetCheck


def with_absolute_paths(config: Config, like: Config | None = None) -> Config:
    """The configuration with absolute paths in its task, as `BaseTask.with_absolute_paths` finds them."""
    return config.model_copy(update={"task": config.task.with_absolute_paths(like and like.task)})


def train(config: Config, *, on_message: Callable[[str], object], on_check: Callable[[int, str], object]) -> Target:
    """Train the toy target of a configuration; report what it is, its checks (step and text) and whether it converged."""
    plan = config.task.training_plan()

    def given_up(attempt: int, last: TargetCheck) -> None:
        on_message(f"attempt {attempt} given up at step {last.step}, still at {last}; another start")

    on_message(f"training the target: {plan.what}")
    target = config.task.train(
        seed=config.seed, device=config.device, on_check=lambda check: on_check(check.step, str(check)), on_given_up=given_up
    )
    history = target.history
    assert history is not None
    last = history.checks[-1]
    half = f"has NOT converged: read what follows as the circuit of a half-trained model, or raise {plan.steps_field}"
    attempts = f" in attempt {history.attempts}" if history.attempts > 1 else ""
    on_message(f"target {'converged' if history.converged else half}{attempts} at step {last.step}: {last}")
    return target


def save(task: BaseTask, target: Target, path: Path) -> None:
    """Write a target that was trained here, in float32 as it was trained, and its training history to `target.json`."""
    assert target.history is not None
    task.save(dataclasses.replace(target, model=copy.deepcopy(target.model).to(torch.float32)), path)
    write_json(path / "target.json", {"format": FORMAT, **dataclasses.asdict(target.history)})


def load(config: Config, path: Path) -> Target:
    """Load the target from a directory of `train-target` or `decompose`. A pretrained target is loaded from its own folder or the Hub.

    Raises `RunDirError` if it is missing or has other shapes, and `ConfigError` if a pretrained target cannot be loaded.
    """
    if not config.task.trained_here:
        return config.task.pretrained(config.dtype)
    return dataclasses.replace(config.task.load(path), history=history(config.task, path))


def history(task: BaseTask, path: Path) -> TargetHistory:
    """The training history of a directory's toy target."""
    document = read_json(path / "target.json")
    checks = tuple(task.check(**check) for check in document["checks"])
    return TargetHistory(checks, converged=document["converged"], attempts=document["attempts"])
