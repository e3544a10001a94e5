"""Check that the files of a run directory are unchanged and belong to one run."""

import hashlib
import re
from pathlib import Path

import torch
from torch import nn

from paramlens.errors import RunDirError
from paramlens.files.manifest import MANIFEST, file_sha256, problems
from paramlens.files.plain import read_json, read_text
from paramlens.runs.checkpoint import CheckpointState, load_state, require_whole
from paramlens.runs.description import ModelDescription, read_description, require_known_format
from paramlens.runs.layout import checkpoints


def require_whole_run(path: Path) -> ModelDescription:
    """Check the configuration, `model.json` and the target against the run's manifest, and run.json against them; return `model.json`.

    Runs of format 1 have no manifest. Raises `RunDirError`, whose message names the file that differs.
    """
    require_known_format(path)
    require_unchanged(path)
    described = read_description(path)
    if described.format > 1 and not (path / MANIFEST).exists():
        raise RunDirError(f"{path / MANIFEST}: missing; restore the file from a copy")
    given, expected = read_json(path / "run.json").get("target"), described.target.sha256
    if not isinstance(given, dict) or given.get("sha256") != expected:
        raise RunDirError(f"{path / 'run.json'}: target {expected[:12]}… expected, another found; restore the file from a copy")
    return described


def require_unchanged(path: Path) -> None:
    """Raise `RunDirError` if a file differs from the directory's manifest. Does nothing if there is no manifest."""
    if (path / MANIFEST).exists() and (found := problems(path, required=("config.yaml",))):
        more = f" (and {len(found) - 1} more)" if found[1:] else ""
        raise RunDirError(f"{found[0]}{more}; it has changed since it was written: restore the file from a copy")


def require_target(path: Path, described: ModelDescription, model: nn.Module) -> None:
    """Raise `RunDirError` unless `model` has the weights that the run was made from."""
    expected, found = described.target.sha256, model_sha256(model)
    if expected != found:
        raise RunDirError(
            f"{path}: made from {described.target.id} with other weights than this model's "
            f"(sha256 {expected[:12]}… expected, {found[:12]}… found); give the model it was made from"
        )


def newest_state(path: Path) -> CheckpointState | None:
    """The state of the newest checkpoint. None: there is none yet. Raises `RunDirError` if it is damaged or of another run."""
    if not (found := checkpoints(path)):
        return None
    require_whole(found[-1])
    require_own(found[-1], path)
    state = load_state(found[-1])
    if state.config not in (None, config_sha256(path)):
        raise RunDirError(f"{found[-1]}: of a run with another configuration than {path / 'config.yaml'}; remove it")
    return state


def require_own(folder: Path, path: Path) -> None:
    """Raise `RunDirError` if a checkpoint was written by another run."""
    model = read_json(folder / "state.json").get("model")
    if model not in (None, file_sha256(path / "model.json")):
        raise RunDirError(f"{folder}: of another run, its state.json names another model.json; remove it, or put the run's own back")


def config_sha256(path: Path) -> str:
    """Hash of the text of `config.yaml` without its number of steps. Fields that a later version adds do not change it."""
    return hashlib.sha256(with_steps(read_text(path / "config.yaml"), 1).encode()).hexdigest()


def with_steps(text: str, steps: int) -> str:
    """The text of `config.yaml` with another number of steps."""
    return re.sub(r"^steps: \d+$", f"steps: {steps}", text, flags=re.MULTILINE)


def model_sha256(model: nn.Module) -> str:
    """Hash of a model's state: names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
