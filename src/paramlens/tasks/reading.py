"""Read text files and JSON lines: UTF-8, with or without a byte order mark, with any line endings."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paramlens.errors import ConfigError


def read_text(path: Path, what: str) -> str:
    """The text of a UTF-8 file, without its byte order mark. what: name of the file in messages. Raises `ConfigError`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, what, error) from None


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file that are not blank, stripped. Raises `ConfigError` as `read_text` does."""
    return [line.strip() for line in read_text(path, what).split("\n") if line.strip()]


def json_lines(path: Path, what: str) -> Iterator[tuple[int, Any]]:
    """The number and value of every line that is not blank. Only a line feed ends a line, as strings may contain U+2028.

    Raises `ConfigError` naming the line that is not JSON.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _value(line, f"{what} line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, what, error) from None


def _value(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not JSON ({error}); give one JSON object a line") from None


def _unreadable(path: Path, what: str, error: OSError | UnicodeDecodeError) -> ConfigError:
    if isinstance(error, OSError):
        return ConfigError(f"{what}: cannot be read ({error.strerror}); give a text file in UTF-8 or JSON lines")
    with path.open("rb") as file:
        other = "UTF-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "another encoding or no text"
    return ConfigError(f"{what}: not in UTF-8 but in {other}; save it in UTF-8")
