"""Names and places in a run directory. Does not import torch, so that a wrong path is reported at once.

config.yaml   all fields; can be run again      run.json   versions, device, dtype, threads, seed, target, status, seconds
model.json    format, sites, shapes, γ, target, task: all that loading needs
metrics.jsonl one line per logged step           target.safetensors, target.json   toy targets: weights, training checks
target/       a language model that was trained here, as a plain Hugging Face folder
MANIFEST.json size in bytes and sha256 of config.yaml, model.json and the target
checkpoints/  see checkpoint.py                  analysis/*.json, report.html
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from paramlens.config.model import Config
from paramlens.errors import RunDirError
from paramlens.files.lock import LOCK, OWNER
from paramlens.files.manifest import MANIFEST
from paramlens.files.plain import PART, read_json, read_text, with_nan
from paramlens.tracking import TRACKING

FORMAT = 3
"""Format version of the directory: the one that is written, and the newest that can be read. Since version 2, the run's own files have a
manifest, model.json has the target and the task, and a checkpoint's state.json has the threads and the state of metrics.jsonl. Since
version 3, the remainder can be a component, and a checkpoint can have fewer subcomponents than the run began with."""

WITH_TASK = 2
"""The first version whose model.json is complete; that of an older run is written anew when the run is resumed."""

CONTENTS = (
    *("checkpoints", "analysis", "report.html", "metrics.jsonl", "model.json", "target.safetensors", "target.json", "target"),
    *(MANIFEST, "config.yaml", "run.json", TRACKING),
)
"""Files and folders of a run directory. Other files in it belong to the user."""


RUNS = "runs"
"""Default folder for runs."""


HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
"""user/name on the Hugging Face Hub."""


_STEP = re.compile(r"step-(\d{8})")


MOST_ANALYSIS = 2**30
"""Maximum size of an analysis, in bytes. The catalogue has every active subcomponent at every shown token."""


def default_out(config: Config) -> Path:
    """Default directory of a run."""
    return Path(RUNS) / f"{config.name}-s{config.seed}"


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (path / "run.json").is_file()


def is_begun(path: Path) -> bool:
    """Whether a run directory can be resumed: it has a checkpoint, or all files that the first step needs."""
    return bool(checkpoints(path)) or (path / MANIFEST).is_file()


def is_resumable(path: Path) -> bool:
    """Whether a run can be resumed. False for a copy pushed without optimizer and random generators, as its run.json says."""
    with contextlib.suppress(RunDirError):
        return read_json(path / "run.json").get("resumable") is not False
    return True


def holds_toy(path: Path) -> bool:
    """Whether a directory has a target that was trained here."""
    return (path / "target.json").is_file()


def is_hub_id(name: str) -> bool:
    """True if `name` looks like user/repo and cannot be a local path: neither it nor the folder `user` exists, and `user` is not runs."""
    if not HUB_ID.fullmatch(name):
        return False
    return not (Path(name).exists() or Path(name).parent.is_dir() or Path(name).parts[0] == RUNS)


def require_path(path: Path) -> None:
    """Raise `RunDirError` for an impossible path: too long, with a NUL character, or not in UTF-8."""
    try:
        str(path.absolute()).encode()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunDirError(f"{str(path)!r}: cannot be a directory of a run ({reason}); give another path") from None


def require_run(path: Path) -> None:
    """Raise `RunDirError` unless `path` is a run directory."""
    require_path(path)
    if not path.exists():
        raise RunDirError(f"{path}: no such run; give the directory that decompose printed")
    if not is_run(path):
        raise RunDirError(f"{path}: not a run directory (it lacks config.yaml or run.json); give the directory that decompose printed")


def require_free(path: Path, *, overwrite: bool) -> None:
    """Raise `RunDirError` if `path` cannot be written or is not empty. With `overwrite`, it may be a run directory."""
    require_path(path)
    standing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise RunDirError(f"{path}: cannot be written ({standing} is no writable directory); give another out")
    if standing != path or not any(entry.name not in (LOCK, OWNER) for entry in path.iterdir()):
        return
    if not overwrite:
        resume = "resume continues it, " if is_run(path) else ""
        raise RunDirError(f"{path} exists; {resume}overwrite replaces it, another out leaves it alone")
    if not is_run(path):
        raise RunDirError(f"{path} exists and is no run directory, so overwrite leaves it alone; give another out")


def clear(path: Path) -> None:
    """Remove the `CONTENTS` of a run directory, and no other files in it."""
    for name in CONTENTS:
        entry = path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def checkpoint_path(path: Path, step: int) -> Path:
    return path / "checkpoints" / f"step-{step:08d}"


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint's name."""
    match = _STEP.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def checkpoints(path: Path) -> list[Path]:
    """Finished checkpoints of a run directory, oldest first."""
    folder = path / "checkpoints"
    return sorted(entry for entry in folder.iterdir() if _STEP.fullmatch(entry.name)) if folder.is_dir() else []


def find_checkpoint(path: Path, step: int | None) -> Path:
    """The newest finished checkpoint, or the one at `step`. Raises `RunDirError` if there is none."""
    found = checkpoints(path)
    if not found:
        raise RunDirError(
            f"{path}: no checkpoint yet; a run that is under way writes one, one that has ended is started anew with overwrite"
        )
    if step is None:
        return found[-1]
    for folder in found:
        if checkpoint_step(folder) == step:
            return folder
    raise RunDirError(f"{path}: no checkpoint at step {step}; there are {', '.join(str(checkpoint_step(folder)) for folder in found)}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`, without an incomplete last line. Raises `RunDirError` if another line is not a JSON mapping."""
    file = path / "metrics.jsonl"
    lines = read_text(file).splitlines() if file.exists() else []
    parsed: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            if not isinstance(document := json.loads(line), dict):
                raise ValueError(f"a mapping was expected, not {type(document).__name__}")
            parsed.append(with_nan(document))
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise RunDirError(f"{file} line {number}: not JSON ({error}); remove the line") from None
    return parsed


def remove_unfinished(path: Path) -> None:
    """Remove unfinished files and folders of a writer that was killed."""
    for folder in (path, path / "checkpoints", path / "analysis"):
        for entry in folder.glob(f"*{PART}"):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
