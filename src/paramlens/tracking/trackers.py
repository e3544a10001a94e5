"""TensorBoard, Weights & Biases and Trackio, each in its own process.

These libraries draw random numbers, print, start threads, fix their folders when they are imported and wait for networks. In their own
processes, none of that affects the run: they get its numbers through a pipe and write to `RUN/tracking`.
"""

import importlib.util
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paramlens.config.model import Config
from paramlens.errors import ConfigError, TrackerError
from paramlens.tracking import TRACKING
from paramlens.tracking.signals import own_session
from paramlens.tracking.tracker import Fanout, LoggedStep, Silent, Terminal, Tracker, is_tracker

LIBRARIES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "trackio": "Trackio"}
"""Name of a tracker, which is also its package and its extra → the library's title."""

PATIENCE = 60.0
"""Seconds that a tracker may take at the end of a run to write or send the rest."""


def select_trackers(names: str | Sequence[str], *, first: Tracker) -> Tracker:
    """Combine `first` with the trackers called `names`. Raises `ConfigError` for a name that is unknown or not installed."""
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    for name in names:
        if name not in LIBRARIES:
            raise ConfigError(f"track {name!r}: no such tracker; there are {', '.join(LIBRARIES)}")
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # no origin: only a folder of that name, such as the one that W&B makes
            raise ConfigError(f"track {name}: {LIBRARIES[name]} is not installed; pip install 'paramlens[{name}]'")
    return Fanout(first, *(SubprocessTracker(name) for name in names)) if names else first


def as_tracker(tracker: Tracker | str | Sequence[str] | None) -> Tracker:
    """The caller's tracker, wrapped so that its errors do not stop the run. None: a silent tracker. Names: the terminal and these.

    Raises `ConfigError` for a name that is unknown or not installed, and for an object that is not a tracker.
    """
    if tracker is None:
        return Silent()
    if isinstance(tracker, str | Sequence):
        return select_trackers(tracker, first=Terminal())
    if not is_tracker(tracker):
        needed = "start, update, evaluated, message and close"
        raise ConfigError(
            f"tracker: {type(tracker).__name__} is not a tracker, which has the methods {needed}; see paramlens.tracking.Tracker"
        )
    return tracker if isinstance(tracker, Fanout) else Fanout(tracker)


class SubprocessTracker:
    """One of `LIBRARIES` in its own process. Raises `TrackerError` if the process has ended, and waits for it only in `close`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._step, self._log = 0, Path()

    def __str__(self) -> str:
        return LIBRARIES[self.name]

    def start(self, phase: str, *, steps: int, done: int, path: Path, config: Config) -> None:  # noqa: ARG002  # required by the protocol
        self.close()
        self._step = done
        folder = path.absolute() / TRACKING / self.name
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder.with_suffix(".log")
        words = [self.name, str(folder), path.absolute().name, str(done)]
        with self._log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from paramlens.tracking.recorders import main; main()", *words],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                encoding="utf-8",
                **own_session(),
            )
        settings = {"config": config.model_dump(mode="json")}
        threading.Thread(target=_feed, args=(self._process, settings, self._lines), daemon=True).start()

    def update(self, logged: LoggedStep) -> None:
        self._step = logged.step
        self._tell(values=logged.scalars())

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        self._tell(values={f"evaluation/{name}": value for name, value in metrics.items()})

    def message(self, text: str) -> None:
        self._tell(message=text)

    def close(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        self._lines.put(None)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise TrackerError(f"had not finished {PATIENCE:g} s after the run; see {self._log}") from None
        self._require(process.returncode == 0, process)

    def _tell(self, **line: Any) -> None:
        if self._process is not None:
            self._require(self._process.poll() is None, self._process)
        self._lines.put({"step": self._step, **line})

    def _require(self, well: bool, process: subprocess.Popen[str]) -> None:
        if not well:
            said = self._log.read_text(encoding="utf-8", errors="replace").splitlines() if self._log.is_file() else []
            last = f"{said[-1][:200]}; " if said and process.returncode == 1 else ""
            self._lines.put(None)
            raise TrackerError(f"ended with exit code {process.returncode} ({last}see {self._log})")


def _feed(process: subprocess.Popen[str], settings: dict[str, Any], lines: "queue.SimpleQueue[dict[str, Any] | None]") -> None:
    """Write lines to a process until None comes or the process has ended, in a thread, so that the run never waits for a full pipe."""
    assert process.stdin is not None
    try:
        with process.stdin as stdin:
            line: dict[str, Any] | None = settings
            while line is not None:
                stdin.write(json.dumps(line) + "\n")
                stdin.flush()
                line = lines.get()
    except OSError:
        return  # the process has ended; the next `_tell` raises
