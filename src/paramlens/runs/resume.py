"""Check whether a run can start or continue in a directory, and reopen the directory of a run that continues."""

from pathlib import Path

from paramlens.config.file import load_config
from paramlens.config.model import Config
from paramlens.errors import ConfigError, RunDirError
from paramlens.fields import differences
from paramlens.files.plain import read_json
from paramlens.method.decomposition import Decomposition
from paramlens.method.importance.network import Importance
from paramlens.runs import targets
from paramlens.runs.checkpoint import CheckpointState
from paramlens.runs.integrity import require_target, require_whole_run
from paramlens.runs.layout import FORMAT, WITH_TASK, is_begun, is_resumable, require_free
from paramlens.runs.writer import RunWriter, versions
from paramlens.tracking.tracker import Tracker


def begin(config: Config, path: Path, *, resume: bool, extend_steps: int | None, overwrite: bool) -> Config:
    """Check that a run can start in `path`, or continue there with `resume`, and return its configuration.

    Raises `ConfigError` for arguments that exclude each other, and `RunDirError` if the directory does not allow it.
    """
    if resume:
        return _continued(config, path, extend_steps=extend_steps, overwrite=overwrite)
    if extend_steps is not None:
        raise ConfigError("extend_steps: continues a run; give it together with resume")
    require_free(path, overwrite=overwrite)
    return config


def _continued(config: Config, path: Path, *, extend_steps: int | None, overwrite: bool) -> Config:
    """Check that the run in `path` can continue with `config`, and return it, with `extend_steps` steps if given.

    Raises `ConfigError` if the run has another configuration or `overwrite` is set, and `RunDirError` if it is damaged.
    """
    if overwrite:
        raise ConfigError("resume and overwrite exclude each other; leave one out")
    if not (path / "config.yaml").is_file():
        raise RunDirError(f"{path}: nothing to resume there; leave resume out to start anew")
    if not is_begun(path):
        raise RunDirError(f"{path}: was stopped before its first step; overwrite starts anew")
    if not is_resumable(path):
        raise RunDirError(
            f"{path}: a copy for reading, pushed without optimizer and generators; push with resumable to get a copy that can be resumed"
        )
    require_whole_run(path)
    saved = load_config(path / "config.yaml")
    config = targets.with_absolute_paths(config, like=saved)
    if extend_steps is not None:
        _require_extendable(saved, extend_steps)
        config, saved = (each.model_copy(update={"steps": extend_steps}) for each in (config, saved))
    if changed := differences(saved.model_dump(), config.model_dump()):
        raise ConfigError(
            f"{path}: was started with another configuration ({'; '.join(changed)}); resume with the same one or give another out"
        )
    return config


def _require_extendable(saved: Config, steps: int) -> None:
    """Raise `ConfigError` if a run of `steps` steps would have been different so far."""
    if steps < saved.steps:
        raise ConfigError(f"extend_steps {steps}: the run is of {saved.steps} steps; give more")
    optim, losses, smooth = saved.optim, saved.losses, saved.smooth
    reasons = {
        f"optim.schedule {optim.schedule}": optim.schedule != "constant",
        f"optim.warmup {optim.warmup:g}, a share": 0 < optim.warmup < 1,
        f"losses.p_start {losses.p_start:g} to p_final {losses.p_final:g}": losses.minimality and losses.p_start != losses.p_final,
        f"smooth.start {smooth.start:g} to final {smooth.final:g}": losses.smooth_minimality and smooth.start != smooth.final,
        f"adversary.start {saved.adversary.start:g}, a share": losses.adversarial and saved.adversary.start,
        f"optim.project_from {optim.project_from}": optim.project_from,
        f"merge.every {saved.merge.every}, from {saved.merge.start:g} to {saved.merge.end:g} of the steps": saved.merge.every,
    }
    if bound := [reason for reason, holds in reasons.items() if holds]:
        raise ConfigError(
            f"extend_steps {steps}: what the run did so far depends on its {saved.steps} steps ({'; '.join(bound)}); "
            f"start a new one with steps {steps}"
        )


def recorded_threads(path: Path, state: CheckpointState | None) -> int | None:
    """Number of CPU threads of the run that continues. With another number, sums are rounded differently."""
    return None if state is None else state.threads or read_json(path / "run.json").get("threads")


def reopen(
    config: Config,
    path: Path,
    state: CheckpointState | None,
    decomposition: Decomposition,
    importance: Importance,
    *,
    tracker: Tracker,
) -> RunWriter:
    """Open the directory of a run that continues, and update it to the current format. Raises `RunDirError` if it is damaged."""
    described = require_whole_run(path)
    require_target(path, described, decomposition.model)
    directory = RunWriter.reopen(path, state)
    before, here = directory.info.get("versions"), versions()
    if before != here:
        tracker.message(f"{path}: begun with {before}, continued with {here}; only the same versions give the same bytes")
        directory.record(versions=here)
    if described.format < WITH_TASK:
        directory.record(format=FORMAT)
        directory.describe(config, decomposition, importance, described.target.model_dump(exclude_none=True))
    if load_config(path / "config.yaml").steps != config.steps:
        directory.extend(config.steps)
    if state is None:
        tracker.message(f"{path}: no checkpoint yet, begins at step 0")
    return directory
