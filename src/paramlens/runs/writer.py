"""Write a run directory; `rundir` reads it."""

import contextlib
import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paramlens.config.file import dump_config
from paramlens.config.model import Config
from paramlens.errors import RunDirError
from paramlens.files.manifest import file_sha256, write_manifest
from paramlens.files.plain import read_json, read_text, write_json, write_text
from paramlens.method.decomposition import Decomposition
from paramlens.method.importance.network import Importance
from paramlens.runs.checkpoint import CheckpointState, prune, write_checkpoint
from paramlens.runs.description import describe, parameters
from paramlens.runs.integrity import config_sha256, with_steps
from paramlens.runs.layout import FORMAT, clear, remove_unfinished, require_free
from paramlens.runs.metrics import MetricsFile
from paramlens.tasks.base import FOLDER
from paramlens.version import __version__


class RunWriter:
    """Writes a run directory. A run has one writer."""

    def __init__(self, path: Path, *, metrics: MetricsFile | None = None) -> None:
        self.path = path
        self.metrics = metrics or MetricsFile(path / "metrics.jsonl")

    @classmethod
    def create(cls, path: str | Path, config: Config, *, overwrite: bool = False) -> "RunWriter":
        """Make a new directory with `config.yaml` and `run.json`. Raises `RunDirError` as `layout.require_free` does."""
        path = Path(path)
        require_free(path, overwrite=overwrite)
        try:
            clear(path)
            path.mkdir(parents=True, exist_ok=True)
            write_text(path / "config.yaml", dump_config(config))
            write_json(path / "run.json", {"format": FORMAT, "versions": versions()})
        except OSError as error:
            raise RunDirError(f"{path}: cannot be written ({error.strerror}); give another out") from None
        return cls(path)

    @classmethod
    def reopen(cls, path: Path, state: CheckpointState | None) -> "RunWriter":
        """Open a directory to continue from a checkpoint, or from step 0 if `state` is None.

        Unfinished files and later metrics are removed. Raises `RunDirError` if the metrics differ from the checkpoint's record.
        """
        remove_unfinished(path)
        recorded, step = ({"bytes": 0, "sha256": hashlib.sha256().hexdigest()}, 0) if state is None else (state.metrics, state.step)
        return cls(path, metrics=MetricsFile.cut(path / "metrics.jsonl", recorded, step=step))

    def describe(self, config: Config, decomposition: Decomposition, importance: Importance, target: dict[str, Any]) -> None:
        """Write `model.json` and the manifest of the files that no longer change."""
        (self.path / "checkpoints").mkdir(exist_ok=True)
        write_json(self.path / "model.json", describe(config, decomposition, importance, target))
        self.seal()

    def extend(self, steps: int) -> None:
        """Change the number of steps in `config.yaml`, and nothing else in its text."""
        file = self.path / "config.yaml"
        write_text(file, with_steps(read_text(file), steps))
        self.seal()

    def seal(self) -> None:
        """Write `MANIFEST.json` of the configuration, `model.json` and the target."""
        files = [self.path / name for name in ("config.yaml", "model.json", "target.safetensors", "target.json")]
        files += sorted((self.path / FOLDER).glob("*"))
        write_manifest(self.path, [file for file in files if file.is_file()])

    @property
    def info(self) -> dict[str, Any]:
        """The content of `run.json`."""
        return read_json(self.path / "run.json")

    def record(self, **fields: Any) -> None:
        """Add fields to `run.json`."""
        write_json(self.path / "run.json", self.info | fields)

    def save_checkpoint(
        self,
        config: Config,
        decomposition: Decomposition,
        importance: Importance,
        *,
        step: int,
        optimizer: Mapping[str, Tensor],
        rng: Mapping[str, Tensor],
    ) -> Path:
        """Write the metrics and a checkpoint, then remove old checkpoints. Raises `OSError` if writing fails."""
        state = {
            "format": FORMAT,
            "step": step,
            "threads": torch.get_num_threads(),
            "metrics": self.metrics.flush(),
            "model": file_sha256(self.path / "model.json"),
            "config": config_sha256(self.path),
        }
        tensors = parameters(decomposition, importance) | {"optimizer": optimizer, "rng": rng}
        final = write_checkpoint(self.path, tensors, state)
        with contextlib.suppress(OSError):  # an old checkpoint that stays does no harm
            prune(self.path, keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every)
        return final


def versions() -> dict[str, str]:
    """Versions on which the bytes of a run may depend."""
    return {"paramlens": __version__, "torch": torch.__version__, "python": platform.python_version()}
