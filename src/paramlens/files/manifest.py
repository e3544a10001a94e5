"""MANIFEST.json: name, size in bytes and sha256 of a folder's files, with which a changed file is found before it is used."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paramlens.errors import RunDirError
from paramlens.files.plain import read_json, write_json

MANIFEST = "MANIFEST.json"


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
"""Name of a file in the folder or in a folder in it. No name can lead out of the folder."""


@dataclass(frozen=True)
class Problem:
    """A problem of one file."""

    file: Path
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.file}: {self.expected} expected, {self.found} found"


def write_manifest(folder: Path, files: Iterable[Path]) -> None:
    """Write `MANIFEST.json` of `files`, which must be in `folder`."""
    entries = {file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in files}
    write_json(folder / MANIFEST, entries)


def problems(folder: Path, names: Sequence[str] | None = None, *, required: Sequence[str] = ()) -> list[Problem]:
    """Differences from the folder's manifest, in the files `names`, or in all files if `names` is None.

    required: files that the manifest must list. Raises `RunDirError` if the manifest itself cannot be read or is invalid.
    """
    entries = _entries(folder / MANIFEST)
    found = [Problem(folder / MANIFEST, f"an entry for {name}", "none") for name in required if name not in entries]
    for name in entries if names is None else [name for name in names if name in entries]:
        file, (size, digest) = folder / name, entries[name]
        if file.is_symlink() or not file.is_file():
            found.append(Problem(file, f"a file of {size} bytes", "something else" if file.exists() or file.is_symlink() else "nothing"))
        elif file.stat().st_size != size:
            found.append(Problem(file, f"{size} bytes", str(file.stat().st_size)))
        elif (actual := file_sha256(file)) != digest:
            found.append(Problem(file, f"sha256 {digest[:12]}…", f"{actual[:12]}…"))
    return found


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes. Raises `RunDirError` if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunDirError(f"{path}: cannot be read ({error.strerror})") from None


def _entries(path: Path) -> dict[str, tuple[int, str]]:
    entries: dict[str, tuple[int, str]] = {}
    for name, entry in read_json(path).items():
        if not _NAME.fullmatch(name):
            raise RunDirError(f"{path}: {name!r} is no file of this folder; restore the file from a copy")
        if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or not isinstance(entry.get("sha256"), str):
            raise RunDirError(f"{path}: bytes and sha256 of {name} expected, {str(entry)[:60]} found; restore the file from a copy")
        entries[name] = entry["bytes"], entry["sha256"]
    return entries
