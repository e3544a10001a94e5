"""SIGINT and SIGTERM: the first lets the step under way finish, a second ends at once."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from paramlens.errors import RunInterrupted, Terminated

WINDOWS = os.name == "nt"
_NUMBERS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts() -> Iterator[Callable[[], int | None]]:
    """Turns the first Ctrl-C or SIGTERM into its number, to be asked for between steps; a second raises `RunInterrupted` at once.

    A signal that is ignored, as under nohup, stays so; outside the main thread nothing is changed.
    """
    seen: list[int] = []

    def handler(number: int, _frame: Any) -> None:
        if seen:
            raise RunInterrupted(number)
        seen.append(number)

    with _handling(handler):
        yield lambda: seen[0] if seen else None


def own_session() -> dict[str, Any]:
    """Options with which `subprocess.Popen` gives a process its own session (Windows: group), which a terminal's Ctrl-C does not reach."""
    if WINDOWS:
        return {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    return {"start_new_session": True}


def request_end(process: subprocess.Popen[str], number: int) -> None:
    """Ask a process to save and end: by a signal; on Windows, where a signal ends it at once, by closing its input."""
    if not WINDOWS:
        process.send_signal(number)
        return
    stdin, process.stdin = process.stdin, None
    if stdin is not None:
        stdin.close()


def terminate_self() -> None:
    """Send SIGTERM to this process, from any thread, so that its handler runs; on Windows `os.kill` would end it at once."""
    if WINDOWS:
        signal.raise_signal(signal.SIGTERM)
    else:
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def termination() -> Iterator[None]:
    """While active, SIGTERM raises `Terminated`, so that what is under way is left in order."""

    def handler(number: int, _frame: Any) -> None:
        raise Terminated(number)

    with _handling(handler, (signal.SIGTERM,)):
        yield


@contextmanager
def _handling(handler: Callable[[int, Any], None], numbers: tuple[signal.Signals, ...] = _NUMBERS) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: old for number in numbers if (old := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
