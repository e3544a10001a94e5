"""What a user sees of a run while it trains: one small protocol, the terminal's side of it, and several trackers as one.

A live line with a bar on a terminal, plain lines elsewhere; always on stderr, so that stdout stays free for results.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from paramlens.config import Config


@dataclass(frozen=True)
class LoggedStep:
    """One logged step: losses as in METHOD's table (nats where reconstruction), p, and active subcomponents per position by site."""

    step: int
    losses: Mapping[str, float]
    total: float
    p: float
    lr: float
    active: Mapping[str, float]

    def scalars(self) -> dict[str, float]:
        """All of it as one flat table, `losses/<name>` and `active/<site>` beside single values; active: the sum over sites."""
        losses = {f"losses/{name}": value for name, value in self.losses.items()}
        active = {f"active/{name}": value for name, value in self.active.items()}
        return {**losses, "total": self.total, "p": self.p, "lr": self.lr, **active, "active": sum(self.active.values())}


@runtime_checkable
class Tracker(Protocol):
    """Follows a run: `start` once per phase, `update` at logged steps, `evaluated` with held-out metrics, `close` at the end.

    `start` is told the run directory, the configuration and the steps done before; what was told of later steps is told again.
    `message` is for what a person should read, and comes before `start` too.
    """

    def start(self, phase: str, *, steps: int, done: int, path: Path, config: Config) -> None: ...

    def update(self, logged: LoggedStep) -> None: ...

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Follows nothing."""

    def start(self, phase: str, *, steps: int, done: int, path: Path, config: Config) -> None: ...

    def update(self, logged: LoggedStep) -> None: ...

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class Terminal:
    """A live bar on a terminal; elsewhere, or with a label to begin each line, a line at most every `seconds` seconds."""

    def __init__(self, console: Console | None = None, *, seconds: float = 5.0, label: str = "") -> None:
        self.console = console or Console(stderr=True)
        self.seconds, self.label = seconds, label
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._steps, self._done, self._started, self._printed = 0, 0, 0.0, -float("inf")

    def start(self, phase: str, *, steps: int, done: int, path: Path, config: Config) -> None:  # noqa: ARG002  # the protocol's
        self.close()
        self._steps, self._done, self._started, self._printed = steps, done, time.monotonic(), -float("inf")
        if self.console.is_terminal and not self.label:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[state]}"),
            )
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._task = self._progress.add_task(phase, total=steps, completed=done, state="")
            self._progress.start()

    def update(self, logged: LoggedStep) -> None:
        losses = "  ".join(f"{name} {value:.1e}" for name, value in logged.losses.items())
        active = f"active {sum(logged.active.values()):.1f}"
        if self._progress is not None and self._task is not None:
            short = f"recon {logged.losses.get('recon', logged.total):.1e}  {active}"
            self._progress.update(self._task, completed=logged.step, state=short)
        elif time.monotonic() - self._printed >= self.seconds or logged.step == self._steps:
            self._printed = time.monotonic()
            rate = (self._printed - self._started) / max(1, logged.step - self._done)
            left = round(rate * (self._steps - logged.step))
            self._line(f"step {logged.step}/{self._steps}  {left // 60}:{left % 60:02d} left  {active}  {losses}")

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out metrics are for metrics.jsonl; a person sees the losses."""

    def message(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            self._line(text)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._task = None, None

    def _line(self, text: str) -> None:
        self.console.print(f"{self.label}{text}", highlight=False, markup=False, soft_wrap=True)


class Fanout:
    """Several trackers as one. Where one of `others` fails, `first` tells it once, and the run goes on without it."""

    def __init__(self, first: Tracker, *others: Tracker) -> None:
        self.first, self._others = first, list(others)

    def start(self, phase: str, *, steps: int, done: int, path: Path, config: Config) -> None:
        self._each(lambda tracker: tracker.start(phase, steps=steps, done=done, path=path, config=config))

    def update(self, logged: LoggedStep) -> None:
        self._each(lambda tracker: tracker.update(logged))

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.evaluated(step, metrics))

    def message(self, text: str) -> None:
        self._each(lambda tracker: tracker.message(text))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        call(self.first)
        for tracker in tuple(self._others):
            try:
                call(tracker)
            except Exception as error:  # whatever a tracker of anybody's raises
                self._others.remove(tracker)
                name = type(tracker).__name__ if type(tracker).__str__ is object.__str__ else str(tracker)
                self.first.message(f"{name}: {str(error) or type(error).__name__}; the run goes on without it")
