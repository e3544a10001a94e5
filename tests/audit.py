"""An audit hook over the whole test suite: what is unpickled, and which files are written."""

import sys
import traceback
from pathlib import Path
from typing import Any

PICKLES_READ: list[str] = []
"""Where something was unpickled since the tests began, by its stack."""

WRITTEN: set[str] = set()
"""Files that were opened for writing."""

CODE = "__pycache__"
"""Folder of compiled code, which Python and Numba keep in their own forms and trust as they trust the source beside it."""

PLANTED: set[str] = set()
"""Pickles that a test laid down to see them refused."""

_LIBRARIES = ("numba", "llvmlite", "multiprocessing", "torch/_inductor", "torch/_dynamo")
"""Unpickle what they hold in memory themselves, never a file of ours."""


def plant(file: Path, content: bytes) -> None:
    """Write a pickle that the library must refuse."""
    PLANTED.add(str(file))
    file.write_bytes(content)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        frames = traceback.extract_stack()
        if not any(library in frame.filename for frame in frames for library in _LIBRARIES):
            PICKLES_READ.append("".join(traceback.format_list(frames[-6:])))
    elif event == "open" and isinstance(args[0], str) and isinstance(args[1], str) and set(args[1]) & set("wax+") and CODE not in args[0]:
        WRITTEN.add(args[0])


sys.addaudithook(_audit)
