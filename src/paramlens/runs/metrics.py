"""metrics.jsonl: one line per logged step or evaluation. Its size and hash are recorded, so that it can be cut back to a checkpoint."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paramlens.errors import RunDirError
from paramlens.files.plain import json_line


class MetricsFile:
    """Writes metrics.jsonl. A line that cannot be written is kept and written before the next. No partial line is left."""

    def __init__(self, path: Path, *, content: bytes = b"") -> None:
        self.path, self._pending = path, b""
        self._bytes, self._digest = len(content), hashlib.sha256(content)

    @classmethod
    def cut(cls, path: Path, recorded: Mapping[str, Any] | None, *, step: int) -> "MetricsFile":
        """Cut the file back to its content at the checkpoint of `step`. A file that was removed starts empty.

        Raises `RunDirError` as `recorded_part` does.
        """
        content = recorded_part(path, recorded, step=step)
        if path.exists():
            os.truncate(path, len(content))
        return cls(path, content=content)

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line, after those that are still to be written. Raises `OSError` if that fails; the lines are then kept."""
        self._pending += json_line(line).encode() + b"\n"
        self._write()

    def flush(self) -> dict[str, Any]:
        """Force everything to the disk; returns size in bytes and sha256 of the file. Raises `OSError` if that fails."""
        self._write()
        if self._bytes:
            with self.path.open("ab") as file:
                os.fsync(file.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def _write(self) -> None:
        if not self._pending:
            return
        try:
            with self.path.open("ab" if self._bytes else "wb") as file:
                file.write(self._pending)
        except OSError:
            if self.path.exists():
                os.truncate(self.path, self._bytes)
            raise
        self._bytes += len(self._pending)
        self._digest.update(self._pending)
        self._pending = b""


def recorded_part(path: Path, recorded: Mapping[str, Any] | None, *, step: int) -> bytes:
    """The content of the file at the checkpoint of `step`, by the recorded size and sha256. In format 1: its lines up to `step`.

    Empty if the file was removed. Raises `RunDirError` if the content differs from the record.
    """
    if not path.exists():
        return b""
    whole = path.read_bytes()
    if recorded is None:
        return _before(path, whole, step)
    content = whole[: recorded["bytes"]]
    if hashlib.sha256(content).hexdigest() != recorded["sha256"]:
        found = f"{len(whole)} bytes" if len(whole) < recorded["bytes"] else "others"
        raise RunDirError(
            f"{path}: the {recorded['bytes']} bytes of step {step} expected at its start, {found} found; "
            "restore the file from a copy, or remove it to go on with a new one"
        )
    return content


def _before(path: Path, content: bytes, step: int) -> bytes:
    """The lines up to a step, without an incomplete last line."""
    lines = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    try:
        return b"".join(line for line in lines if json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError) as error:
        raise RunDirError(f"{path}: a line is not one of ours ({error}); remove it") from None
