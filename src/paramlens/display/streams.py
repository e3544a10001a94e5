"""What a command prints to: encodings that lack a letter, readers that have gone, streams that were closed before it started."""

import contextlib
import io
import os
import sys
from typing import TextIO

from rich.console import Console


class ErrorConsole(Console):
    """A console on stderr. Once nobody reads it any more it goes quiet, and neither the work nor the result on stdout suffers."""

    def __init__(self) -> None:
        super().__init__(stderr=True)

    def on_broken_pipe(self) -> None:
        """Print nothing from now on, neither here nor elsewhere on stderr."""
        self.quiet = True
        abandon(sys.stderr)


def prepare_streams() -> None:
    """Make the standard streams safe to use: open, and able to write every letter.

    One that was closed before the start leads nowhere; its place would otherwise go to the next file that is opened. A letter that the
    encoding lacks is written as its escape sequence, γ as \\u03b3.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def abandon(stream: TextIO | None) -> None:
    """Let what is still to be written to a broken stream go nowhere, so that the end of the process does not fail on it."""
    with contextlib.suppress(OSError, ValueError):
        if stream is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
