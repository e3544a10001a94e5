"""Standard streams of a command: encodings that lack a character, readers that have closed, streams closed before the start."""

import contextlib
import io
import os
import sys
from typing import TextIO

from rich.console import Console


class ErrorConsole(Console):
    """A console on stderr. If its reader closes, it prints nothing more; the work and the result on stdout are not affected."""

    def __init__(self) -> None:
        super().__init__(stderr=True)

    def on_broken_pipe(self) -> None:
        """Print nothing more, here and elsewhere on stderr."""
        self.quiet = True
        abandon(sys.stderr)


def prepare_streams() -> None:
    """Make sure that the standard streams are open and can write every character.

    A stream that was closed before the start is opened on the null device; otherwise the next opened file would get its descriptor. A
    character that the encoding lacks is written as its escape sequence, γ as \\u03b3.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def abandon(stream: TextIO | None) -> None:
    """Send further output of a broken stream to the null device, so that the process can end without an error."""
    with contextlib.suppress(OSError, ValueError):
        if stream is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
