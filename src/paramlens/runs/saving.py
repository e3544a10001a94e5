"""Save a run during training. If a save fails, training goes on and the save is tried again soon."""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paramlens.config.model import Checkpoint
from paramlens.errors import RunDirError, SaveError
from paramlens.method.decomposition import Decomposition
from paramlens.method.importance.network import Importance
from paramlens.runs.budget import size_text
from paramlens.runs.checkpoint import FILES
from paramlens.runs.layout import checkpoint_path, checkpoint_step, checkpoints
from paramlens.runs.writer import RunWriter

TRIES = 5
"""Number of failed saves in a row after which a run stops."""

PAUSES = (1.0, 2.0, 4.0)
"""Seconds before each new try of a save that cannot wait: at the end of a run or after a signal."""


class Saver:
    """Writes a run's checkpoints and metrics to a disk that may fail. Failures are reported; earlier checkpoints stay."""

    def __init__(self, directory: RunWriter, *, every: int, message: Callable[[str], object]) -> None:
        self.directory, self.every, self.message = directory, every, message
        self.again: int | None = None
        """Step at which a failed save is tried again. None: no save failed."""
        self.failures = 0
        self.lines_wait = False

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due at this step."""
        return step % self.every == 0 or step == self.again

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl. If that fails, the line is written together with the next."""
        try:
            self.directory.metrics.append(line)
            self.lines_wait = False
        except OSError as error:
            if not self.lines_wait:
                self.message(f"{self.directory.metrics.path}: cannot be written ({_reason(error)}); its lines are kept until the next try")
            self.lines_wait = True

    def save(self, write: Callable[[], object], step: int, *, now: bool) -> None:
        """Write the checkpoint of `step`. A failure is reported, and the save is tried again at a later step or, with `now`, after a pause.

        Raises `SaveError` after too many failures.
        """
        for pause in (*PAUSES, None) if now else (None,):
            try:
                require_free_space(self.directory.path)
                write()
            except (OSError, RunDirError) as error:
                self.failures += 1
                reason = _reason(error)
                final = checkpoint_path(self.directory.path, step)
                if pause is not None:
                    self.message(f"{final}: cannot be written ({reason}); trying again in {pause:g} s")
                    time.sleep(pause)
                elif now or self.failures >= TRIES:
                    raise SaveError(self._given_up(final, reason)) from None
                else:
                    self.again = step + max(1, self.every // 10)
                    self.message(f"{final}: cannot be written ({reason}); the run goes on, and tries again at step {self.again}")
            else:
                if self.failures:
                    self.message(f"{checkpoint_path(self.directory.path, step)}: written again")
                self.failures, self.again = 0, None
                return

    def record(self, **fields: Any) -> None:
        """Add fields to run.json. A failure is reported but not raised."""
        try:
            self.directory.record(**fields)
        except (OSError, RunDirError) as error:
            self.message(
                f"{self.directory.path / 'run.json'}: cannot be written ({_reason(error)}), so it does not say {fields['status']!r}"
            )

    def _given_up(self, final: Path, reason: str) -> str:
        whole: list[Path] = []
        with contextlib.suppress(OSError):
            whole = checkpoints(self.directory.path)
        kept = f"the checkpoint of step {checkpoint_step(whole[-1])} is whole" if whole else "there is no checkpoint before it"
        return f"{final}: could not be written after {self.failures} tries ({reason}); {kept}. Make room, then resume the run"


def _reason(error: OSError | RunDirError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def require_free_space(path: Path) -> None:
    """Raise `OSError` if the free disk space is below the size of the newest checkpoint, as the next is equally large."""
    if not (found := checkpoints(path)):
        return
    needed = sum((found[-1] / name).stat().st_size for name in FILES)
    free = shutil.disk_usage(path).free
    if free < needed:
        raise OSError(None, f"{size_text(needed)} needed, {size_text(free)} free on its disk")


def require_space(
    path: Path, checkpoint: Checkpoint, decomposition: Decomposition, importance: Importance, *, start: int, steps: int
) -> None:
    """Raise `RunDirError` if the disk of `path` has no room for the most checkpoints that exist at once, with the one being written."""
    parameters = [*decomposition.parameters(), *importance.parameters()]
    each = 3 * sum(value.numel() * value.element_size() for value in parameters) + 2**16  # the optimizer has two numbers per parameter
    written = math.ceil(steps / checkpoint.every) - start // checkpoint.every
    kept = 0 if checkpoint.keep_every is None else steps // checkpoint.keep_every - start // checkpoint.keep_every
    count = min(written, checkpoint.keep_last + 1 + kept)
    needed, free = count * each, shutil.disk_usage(path).free + _held(path)
    if free < needed:
        raise RunDirError(
            f"{path}: {count} checkpoints of {size_text(each)} need {size_text(needed)} of disk, {size_text(free)} are free; make room, "
            f"lower checkpoint.keep_last ({checkpoint.keep_last}), C or gamma.d_gate, or give an out on another disk"
        )


def _held(path: Path) -> int:
    """Bytes of the existing checkpoints, which newer ones will replace."""
    return sum(file.stat().st_size for folder in checkpoints(path) for file in folder.iterdir())
