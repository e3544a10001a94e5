"""One writer per run directory: a lock that the operating system releases when its process ends, and a file that names this process."""

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from paramlens.errors import RunDirError
from paramlens.files.plain import write_json

LOCK, OWNER = ".lock", ".lock.json"
"""The file that a writer locks, and the file that names the writer."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """While active, only this process writes to the run directory `path`, which is made if it is missing.

    The lock of a process that died is free again. A directory that was made here and is still empty at the end is removed. Raises
    `RunDirError` if another process has the lock, or if the directory cannot be written.
    """
    made = [place for place in (path, *path.parents) if not place.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunDirError(f"{path}: {_owner(path)}; wait for it, or give another out") from None
        write_json(path / OWNER, {"pid": os.getpid(), "host": platform.node(), "since": time.time(), "command": sys.argv[:2]})
    except OSError as error:
        raise RunDirError(f"{path}: cannot be written ({error.strerror}); give another out") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the directory may be gone
            (path / OWNER).unlink(missing_ok=True)
            lock.release()
            _remove_empty(path, made)


def _owner(path: Path) -> str:
    try:
        owner = json.loads((path / OWNER).read_text(encoding="utf-8"))
        minutes = max(0, time.time() - owner["since"]) / 60
        return f"process {owner['pid']} on {owner['host']} has been writing to it for {minutes:.0f} min"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process is writing to it"


def _remove_empty(path: Path, made: list[Path]) -> None:
    if path in made and {entry.name for entry in path.iterdir()} <= {LOCK}:  # on some systems the lock removes its file itself
        (path / LOCK).unlink(missing_ok=True)
        for place in made:
            place.rmdir()
