"""Handle SIGINT and SIGTERM: the first signal lets the current step finish, and a second ends the run at once."""

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
    """While active, the first Ctrl-C or SIGTERM is only recorded. A second raises `RunInterrupted` at once.

    Yields a function that returns the number of the first signal, or None. Ignored signals, as under nohup, stay ignored. Outside the
    main thread nothing is changed.
    """
    seen: list[int] = []

    def handler(number: int, _frame: Any) -> None:
        if seen:
            raise RunInterrupted(number)
        seen.append(number)

    with _handling(handler):
        yield lambda: seen[0] if seen else None


def own_session() -> dict[str, Any]:
    """Options of `subprocess.Popen` for a process in its own session (Windows: group), which a Ctrl-C in the terminal does not reach."""
    if WINDOWS:
        return {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    return {"start_new_session": True}


def request_end(process: subprocess.Popen[str], number: int) -> None:
    """Ask a process to save and end. Sends a signal or, on Windows, where a signal ends it at once, closes its input."""
    if not WINDOWS:
        process.send_signal(number)
        return
    stdin, process.stdin = process.stdin, None
    if stdin is not None:
        stdin.close()


def terminate_self() -> None:
    """Send SIGTERM to this process, from any thread, so that its handler runs. On Windows, `os.kill` would end it at once."""
    if WINDOWS:
        signal.raise_signal(signal.SIGTERM)
    else:
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def termination() -> Iterator[None]:
    """While active, SIGTERM raises `Terminated`, so that `finally` blocks still run."""

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
