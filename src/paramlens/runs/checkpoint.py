"""Checkpoints: each is written completely or not at all, and is checked before it is read.

    step-00002000/ {components, importance, optimizer, rng}.safetensors, state.json, MANIFEST.json

The files are written to a folder with the ending `.part` and synced, the manifest last. Then the folder is renamed and its parent synced.
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
from paramlens.files.tensorfile import copy_into, load_tensors, save_tensors, shapes_of
from paramlens.method.decomposition import Decomposition
from paramlens.method.importance.network import Importance
from paramlens.method.merging import resize
from paramlens.runs.description import ModelDescription, parameters, read_description
from paramlens.runs.layout import checkpoint_path, checkpoint_step, checkpoints, is_resumable

LOADED = ("components.safetensors", "importance.safetensors")
"""Files that are needed to read a run."""

RESUMED = ("optimizer.safetensors", "rng.safetensors")
"""Files that are needed only to resume. A copy pushed without them does not list them in its manifests."""

FILES = (*LOADED, *RESUMED, "state.json")
"""All files of a checkpoint."""


@dataclass(frozen=True)
class CheckpointState:
    """What is needed to resume, besides U, V and γ. In format 1, threads, metrics, model and config are None."""

    step: int
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    threads: int | None
    """Number of CPU threads. With another number, sums are rounded differently."""
    metrics: Mapping[str, Any] | None
    """Size in bytes and sha256 of metrics.jsonl at this step."""
    model: str | None
    """sha256 of the run's model.json."""
    config: str | None
    """sha256 of the run's configuration without its number of steps."""


def write_checkpoint(path: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `state["step"]` into a run directory. If that fails, raises `OSError` and leaves no files."""
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
    """Remove old checkpoints. Keeps the newest `keep_last` and those at multiples of `keep_every`. Raises `OSError` if that fails."""
    for old in checkpoints(path)[:-keep_last]:
        if not keep_every or checkpoint_step(old) % keep_every:
            discard(old)


def require_whole(folder: Path, files: Sequence[str] = FILES) -> None:
    """Raise `RunDirError` unless `files` match the checkpoint's manifest. The message names the newest undamaged checkpoint."""
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
    """The problems of a checkpoint, in `files` or, if that is None, in all its files."""
    required = FILES if is_resumable(folder.parent.parent) else [name for name in FILES if name not in RESUMED]
    try:
        found: list[Problem] = problems(folder, files, required=required)
    except RunDirError as error:
        return [str(error).removesuffix("; restore the file from a copy")]
    return [str(each) for each in found]


def load_state(folder: Path) -> CheckpointState:
    """Read the state that resuming needs. Raises `RunDirError` if state.json is of another step."""
    state = read_json(folder / "state.json")
    if state.get("step") != checkpoint_step(folder):
        raise RunDirError(f"{folder / 'state.json'}: step {checkpoint_step(folder)} expected, {state.get('step')!r} found; remove {folder}")
    return CheckpointState(
        step=state["step"],
        optimizer=load_tensors(folder / "optimizer.safetensors"),
        rng=load_tensors(folder / "rng.safetensors"),
        **{name: state.get(name) for name in ("threads", "metrics", "model", "config")},
    )


def subcomponents(folder: Path, described: ModelDescription) -> dict[str, int]:
    """Site → number of its subcomponents at a checkpoint: that of the start, or, where Δ could take in some, that of the file."""
    if not described.delta:
        return {site.name: described.C for site in described.sites}
    shapes = {name: shape for name, (shape, _) in shapes_of(folder / "components.safetensors").items()}
    found = {site.name: shapes.get(f"{site.name}.U", ()) for site in described.sites}
    return {name: shape[1] if len(shape) == 2 and 0 < shape[1] <= described.C else described.C for name, shape in found.items()}


@torch.no_grad()
def load_parameters(folder: Path, decomposition: Decomposition, importance: Importance) -> None:
    """Load a checkpoint's U, V and γ, with as many subcomponents as it has.

    Raises `RunDirError` for a tensor that is missing or has another shape or type.
    """
    described = read_description(folder.parent.parent)
    resize(decomposition, importance, subcomponents(folder, described))
    for name, tensors in parameters(decomposition, importance).items():
        copy_into(folder / f"{name}.safetensors", tensors)
