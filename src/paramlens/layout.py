"""Names, places and plain files of a run directory: all of it that needs no torch, so that a wrong path is refused at once."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from paramlens.config import Config
from paramlens.errors import RunDirError

FORMAT = 1
"""Version of the directory's format that is written, and the newest that is read."""

_CONTENTS = (
    *("checkpoints", "analysis", "report.html", "metrics.jsonl", "model.json", "target.safetensors", "target.json", "target"),
    *("config.yaml", "run.json"),
)

_STEP = re.compile(r"step-(\d{8})")


def default_out(config: Config) -> Path:
    """Where a run goes unless told otherwise."""
    return Path("runs") / f"{config.name}-s{config.seed}"


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (path / "run.json").is_file()


def holds_toy(path: Path) -> bool:
    """Whether a directory holds a target that was trained here."""
    return (path / "target.json").is_file()


def require_run(path: Path) -> None:
    """Raise `RunDirError` unless `path` is a run directory."""
    if not path.exists():
        raise RunDirError(f"{path}: no such run; give the directory that decompose printed")
    if not is_run(path):
        raise RunDirError(f"{path}: not a run directory (it lacks config.yaml or run.json); give the directory that decompose printed")


def require_free(path: Path, *, overwrite: bool) -> None:
    """Raise `RunDirError` if `path` holds anything or cannot be written; with `overwrite`, only if that is no run directory."""
    standing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise RunDirError(f"{path}: cannot be written ({standing} is no writable directory); give another --out")
    if standing != path or not any(path.iterdir()):
        return
    if not overwrite:
        resume = "--resume continues it, " if checkpoints(path) else ""
        raise RunDirError(f"{path} exists; {resume}--overwrite replaces it, --out DIR writes elsewhere")
    if not is_run(path):
        raise RunDirError(f"{path} exists and is no run directory, so --overwrite leaves it alone; give another --out")


def clear(path: Path) -> None:
    """Remove what a run directory holds, and nothing else that lies there."""
    for name in _CONTENTS:
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
        raise RunDirError(f"{path}: holds no finished checkpoint; decompose again with --overwrite")
    if step is None:
        return found[-1]
    for folder in found:
        if checkpoint_step(folder) == step:
            return folder
    raise RunDirError(f"{path}: no checkpoint at step {step}; there are {', '.join(str(checkpoint_step(folder)) for folder in found)}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`; a last line that was cut off is left out. Raises `RunDirError` for any other that is not JSON."""
    file = path / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    parsed: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise RunDirError(f"{file} line {number}: not JSON ({error}); remove the line") from None
    return parsed


def file_sha256(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; raises `RunDirError` if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunDirError(f"{path}: missing") from None
    except json.JSONDecodeError as error:
        raise RunDirError(f"{path}: not JSON ({error})") from None


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Replace a file whole by indented JSON."""
    write_text(path, json.dumps(document, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file whole: readers see the old text or the new."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def sync(path: Path) -> None:
    """Force a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
