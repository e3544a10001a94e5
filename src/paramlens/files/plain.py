"""Read and write text and JSON files that are complete or absent. Errors say why a file cannot be read."""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paramlens.errors import RunDirError

PART = ".part"
"""Ending of a file or folder that is being written or removed. It is never read, and the next writer removes it."""


WINDOWS = os.name == "nt"

_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""Errors of file systems that cannot flush directories, such as some network shares."""


MOST_JSON = 64 * 2**20
"""Maximum size of a JSON file, in bytes."""


def read_json(path: Path, *, most: int = MOST_JSON) -> dict[str, Any]:
    """Read the mapping in a JSON file of at most `most` bytes. Raises `RunDirError` if it is missing, unreadable or not a mapping."""
    text = read_text(path, most=most)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunDirError(f"{path}: not JSON ({error}); restore the file from a copy") from None
    if not isinstance(document, dict):
        raise RunDirError(f"{path}: a mapping was expected, not {type(document).__name__}; restore the file from a copy")
    return document


def read_text(path: Path, *, most: int | None = None) -> str:
    """Read a text file of at most `most` bytes. Raises `RunDirError` if it cannot be read, is longer, or is not in UTF-8."""
    try:
        if most is not None and (size := path.stat().st_size) > most:
            raise RunDirError(f"{path}: {size} bytes, at most {most} were expected; restore the file from a copy")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunDirError(f"{path}: missing; restore the file from a copy") from None
    except UnicodeDecodeError as error:
        raise RunDirError(f"{path}: not a text file in UTF-8 (byte {error.start}); restore the file from a copy") from None
    except OSError as error:
        raise RunDirError(f"{path}: cannot be read ({error.strerror})") from None


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Replace a file by indented JSON, as `write_text` does."""
    write_text(path, json_text(document))


def json_text(document: Mapping[str, Any]) -> str:
    """JSON as in run directories: indented, with a newline at the end."""
    return json_line(document, indent=2) + "\n"


def json_line(document: Mapping[str, Any], *, indent: int | None = None) -> str:
    """JSON in ASCII, with null for numbers that are not finite, which JSON cannot express."""
    return json.dumps(_finite(document), indent=indent, allow_nan=False)


def with_nan(tree: Any) -> Any:
    """Replace each None in nested mappings by NaN, which `json_line` writes as null."""
    if isinstance(tree, Mapping):
        return {key: with_nan(value) for key, value in tree.items()}
    return math.nan if tree is None else tree


def _finite(tree: Any) -> Any:
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {key: _finite(value) for key, value in tree.items()}
    return [_finite(value) for value in tree] if isinstance(tree, list | tuple) else tree


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old text or the new text, even if the process is killed."""
    part = path.with_name(path.name + PART)
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, to the disk. Directories are skipped if the system cannot open or flush them.

    Windows cannot open a directory, and flushes only files that are open for writing.
    """
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    except PermissionError:
        if folder:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in _CANNOT_FLUSH:
            raise
    finally:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Remove a directory that others may read. It is renamed first, so that nobody reads half of it."""
    part = folder.with_name(folder.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    folder.rename(part)
    shutil.rmtree(part, ignore_errors=True)
