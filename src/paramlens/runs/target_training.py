"""Train a toy target without decomposing it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from paramlens.config.model import Config
from paramlens.errors import ConfigError
from paramlens.files.lock import locked
from paramlens.kernels.machine import machine
from paramlens.method.task import TargetHistory
from paramlens.runs import targets
from paramlens.runs.forecast import require_training_room
from paramlens.runs.layout import require_free
from paramlens.runs.writer import RunWriter
from paramlens.tasks.base import Target
from paramlens.tracking.tracker import Tracker, follows_targets, report_target
from paramlens.tracking.trackers import as_tracker


def train_target(
    config: Config, out: Path, *, overwrite: bool = False, tracker: Tracker | str | Sequence[str] | None = None
) -> TargetHistory:
    """Train the toy target of a configuration and write it to the directory `out`, which `decompose_config` takes as `target`.

    tracker: as for `decompose`. Returns the training history. Raises `ConfigError` if the target is not trained here, and `RunDirError` if
    `out` is taken.
    """
    if not config.task.trained_here:
        raise ConfigError(f"{config.name}: its target is pretrained, or a model of your own; there is nothing to train")
    require_free(out, overwrite=overwrite)
    with locked(out):
        target = trained_target(config, tracker=as_tracker(tracker))
        directory = RunWriter.create(out, config, overwrite=overwrite)
        targets.save(config.task, target, out)
        directory.seal()
    assert target.history is not None
    return target.history


def trained_target(config: Config, *, tracker: Tracker) -> Target:
    """Train the toy target of a configuration; report its progress and whether it converged."""
    require_device(config.device)
    require_training_room(config)
    if follows_targets(tracker):
        tracker.start_target(steps=config.task.training_plan().steps)
    try:
        with machine(config):
            return targets.train(config, on_message=tracker.message, on_check=partial(report_target, tracker))
    finally:
        tracker.close()


def require_device(device: str) -> None:
    kind = torch.device(device).type
    if kind != "cpu" and not getattr(torch, kind).is_available():
        raise ConfigError(f"device {device}: torch {torch.__version__} finds none here; give cpu")
