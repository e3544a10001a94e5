"""A checkpoint: written whole or not at all, and checked before it is read.

    step-00002000/ {components, importance, optimizer, rng}.safetensors, state.json, MANIFEST.json

Everything is written beside its place as `.part` and synced, the manifest last; then the directory is renamed and its parent synced.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paramlens.errors import RunDirError
from paramlens.files.manifest import Problem, problems, write_manifest
from paramlens.files.plain import PART, discard, read_json, sync, write_json
from paramlens.files.tensorfile import copy_into, load_tensors, save_tensors
from paramlens.method.decomposition import Decomposition
from paramlens.method.importance.network import Importance
from paramlens.runs.description import parameters
from paramlens.runs.layout import checkpoint_path, checkpoint_step, checkpoints, is_resumable

LOADED = ("components.safetensors", "importance.safetensors")
"""What reading a run needs."""

RESUMED = ("optimizer.safetensors", "rng.safetensors")
"""What only resuming needs; a copy that was pushed without them lacks them in its manifests too."""

FILES = (*LOADED, *RESUMED, "state.json")
"""All of a checkpoint."""


@dataclass(frozen=True)
class CheckpointState:
    """What resuming needs beside U, V and γ. Format 1 has no threads, metrics, model and config; they are None."""

    step: int
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    threads: int | None
    """CPU threads; with another number, sums round differently."""
    metrics: Mapping[str, Any] | None
    """Bytes and sha256 of metrics.jsonl at this step."""
    model: str | None
    """sha256 of the run's model.json."""
    config: str | None
    """sha256 of the run's configuration without its number of steps."""


def write_checkpoint(path: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `state["step"]` into a run directory. If the disk fails, raises `OSError` and leaves nothing."""
    final = checkpoint_path(path, state["step"])
    part = final.with_name(final.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        for name, group in tensors.items():
            save_tensors(part / f"{name}.safetensors", group)
        write_json(part / "state.json", state)
        write_manifest(part, sorted(part.iterdir()))
        if final.exists():
            discard(final)
        part.rename(final)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync(final.parent)
    return final


def prune(path: Path, *, keep_last: int, keep_every: int | None) -> None:
    """Remove all but the newest `keep_last`, and those of every `keep_every`-th step. Raises `OSError` if one cannot be removed."""
    for old in checkpoints(path)[:-keep_last]:
        if not keep_every or checkpoint_step(old) % keep_every:
            discard(old)


def require_whole(folder: Path, files: Sequence[str] = FILES) -> None:
    """Raise `RunDirError` unless `files` are as the checkpoint's manifest says, naming the newest checkpoint that is whole."""
    if not (damaged := damage(folder, files)):
        return
    others = [each for each in reversed(checkpoints(folder.parent.parent)) if each != folder and not damage(each)]
    if others:
        remedy = f"remove {folder} to use the checkpoint of step {checkpoint_step(others[0])}, which is whole"
    else:
        remedy = "no other checkpoint is whole; restore the file from a copy, or start anew with overwrite"
    more = f" (and {len(damaged) - 1} more)" if damaged[1:] else ""
    raise RunDirError(f"{damaged[0]}{more}; {remedy}")


def damage(folder: Path, files: Sequence[str] | None = None) -> list[str]:
    """What is wrong with a checkpoint, in `files` or in all it has."""
    required = FILES if is_resumable(folder.parent.parent) else [name for name in FILES if name not in RESUMED]
    try:
        found: list[Problem] = problems(folder, files, required=required)
    except RunDirError as error:
        return [str(error).removesuffix("; restore the file from a copy")]
    return [str(each) for each in found]


def load_state(folder: Path) -> CheckpointState:
    """Raises `RunDirError` for a state.json that is not of this step."""
    state = read_json(folder / "state.json")
    if state.get("step") != checkpoint_step(folder):
        raise RunDirError(f"{folder / 'state.json'}: step {checkpoint_step(folder)} expected, {state.get('step')!r} found; remove {folder}")
    return CheckpointState(
        step=state["step"],
        optimizer=load_tensors(folder / "optimizer.safetensors"),
        rng=load_tensors(folder / "rng.safetensors"),
        **{name: state.get(name) for name in ("threads", "metrics", "model", "config")},
    )


@torch.no_grad()
def load_parameters(folder: Path, decomposition: Decomposition, importance: Importance) -> None:
    """Copy a checkpoint's U, V and γ in. Raises `RunDirError` naming the tensor that is missing, of another shape or type."""
    for name, tensors in parameters(decomposition, importance).items():
        copy_into(folder / f"{name}.safetensors", tensors)
