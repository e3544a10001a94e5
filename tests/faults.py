"""Faults for the matrix of tests/test_faults.py: a command run in a child process that is killed, starved or lied to at a chosen moment."""

import hashlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from paramlens.cli.main import main
from paramlens.runs.layout import checkpoints

resource = pytest.importorskip("resource", reason="faults strike in a forked process under POSIX's limits")

Fault = Callable[[pytest.MonkeyPatch], None]
"""Prepares the child process, so that the fault strikes when its moment comes."""


def run(words: list[str], log: Path, fault: Fault = lambda _: None) -> tuple[int, list[str]]:
    """Exit code (negative: the signal it died of) of a command in a forked process under a fault, and its lines on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on: other threads do not go on in the fork
        pid = os.fork()
    if pid == 0:
        code = 70
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = sys.stderr = os.fdopen(2, "w", encoding="utf-8")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            fault(pytest.MonkeyPatch())
            code = main(words)
        except BaseException:  # the child must not go on as a second pytest
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8").splitlines()


def told(lines: list[str]) -> list[str]:
    """What a command says in the end: from the line of its error on."""
    starts = [i for i, line in enumerate(lines) if line.startswith("paramlens: ")]
    return lines[starts[0] :] if starts else lines


def result(path: Path) -> dict[str, str]:
    """Hash of all that a finished run is judged by: the newest checkpoint, weights, optimizer and all, and the metrics.

    Python's own generator is left out: beartype, which checks the library while it is tested, draws from it at every call.
    """
    folder = checkpoints(path)[-1]
    names = ("components.safetensors", "importance.safetensors", "optimizer.safetensors", "state.json")
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    rng = load_file(folder / "rng.safetensors")
    hashes |= {name: hashlib.sha256(rng[name].numpy().tobytes()).hexdigest() for name in rng if not name.startswith("python")}
    return hashes | {"step": folder.name, "metrics.jsonl": hashlib.sha256((path / "metrics.jsonl").read_bytes()).hexdigest()}


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())} if folder.is_dir() else {}


def nth(patch: pytest.MonkeyPatch, owner: Any, name: str, count: int, strike: Callable[..., Any]) -> None:
    """At its `count`-th call `owner.name` is `strike(original, *args)` instead."""
    original, calls = getattr(owner, name), 0

    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return strike(original, *args, **kwargs) if calls == count else original(*args, **kwargs)

    patch.setattr(owner, name, replaced)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def before(number: int) -> Callable[..., Any]:
    """Strike with a signal, then go on."""

    def strike(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        send(number)
        return original(*args, **kwargs)

    return strike


def after(number: int) -> Callable[..., Any]:
    """Go on, then strike with a signal."""

    def strike(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        value = original(*args, **kwargs)
        send(number)
        return value

    return strike


def half_written(number: int) -> Callable[..., Any]:
    """Strike when half of a tensor file is on the disk; a process that lives on writes the rest."""

    def strike(original: Callable[..., Any], file: Path, tensors: Any) -> Any:
        original(file, tensors)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        send(number)
        file.write_bytes(whole)

    return strike


def half_a_line(number: int) -> Callable[..., Any]:
    """Strike when half of a line is in metrics.jsonl; a process that lives on writes the rest."""

    def strike(original: Callable[..., Any], self: Any) -> Any:
        pending, self._pending = self._pending, b""
        with self.path.open("ab") as file:
            file.write(pending[: len(pending) // 2])
        send(number)
        os.truncate(self.path, self._bytes)
        self._pending = pending
        return original(self)

    return strike


def half_removed(number: int) -> Callable[..., Any]:
    """Strike when an old checkpoint is half removed; a process that lives on removes the rest."""

    def strike(original: Callable[..., Any], folder: Path, **kwargs: Any) -> Any:
        for file in sorted(Path(folder).iterdir())[:3]:
            file.unlink()
        send(number)
        return original(folder, **kwargs)

    return strike


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what a full disk looks like to one who writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_for(patch: pytest.MonkeyPatch, owner: Any, name: str, matches: Callable[..., bool], *, times: int, size: int) -> None:
    """The first `times` calls of `owner.name` whose arguments match meet a full disk: files may not grow beyond `size` bytes."""
    original, met = getattr(owner, name), 0

    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal met
        if matches(*args) and met < times:
            met += 1
            with file_limit(size):
                return original(*args, **kwargs)
        return original(*args, **kwargs)

    patch.setattr(owner, name, replaced)
