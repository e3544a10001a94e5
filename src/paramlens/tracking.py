"""What a user sees of a run while it trains: one small protocol, and the terminal's side of it.

A live line with a bar on a terminal, plain lines elsewhere; always on stderr, so that stdout stays free for results.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from paramlens.tables import packed


@dataclass(frozen=True)
class LoggedStep:
    """One logged step: losses as in METHOD's table (nats where reconstruction), p, and active subcomponents per position by site."""

    step: int
    losses: Mapping[str, float]
    total: float
    p: float
    lr: float
    active: Mapping[str, float]


@runtime_checkable
class Tracker(Protocol):
    """Follows a run. `start` once per phase, `update` at logged steps, `message` for what a person should read, `close` at the end."""

    def start(self, phase: str, *, steps: int, done: int) -> None: ...

    def update(self, logged: LoggedStep) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class TargetTracker(Tracker, Protocol):
    """A tracker that follows the training of a toy target as well: `target` at its checks, between `start` and `close`.

    A step that is not above the one before begins another attempt. Trackers without it are given each check as a message.
    """

    def target(self, step: int, text: str) -> None: ...


class Silent:
    """Follows nothing."""

    def start(self, phase: str, *, steps: int, done: int) -> None: ...

    def update(self, logged: LoggedStep) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class Terminal:
    """A live bar on a terminal; elsewhere, or with a label to begin each line, a line at most every `seconds` seconds.

    Losses, active counts and time left either way. What does not fit the width goes on in a line below; nothing runs over.
    """

    def __init__(self, console: Console | None = None, *, seconds: float = 5.0, label: str = "") -> None:
        self.console = console or Console(stderr=True)
        self.seconds, self.label = seconds, label
        self._progress: _Live | None = None
        self._task: TaskID | None = None
        self._steps, self._done, self._started, self._printed = 0, 0, 0.0, -float("inf")
        self._last, self._shown = 0, 0.0

    def start(self, phase: str, *, steps: int, done: int) -> None:
        self.close()
        self._steps, self._done, self._printed, self._last = steps, done, -float("inf"), done
        self._started = self._shown = time.monotonic()
        if self.console.is_terminal and not self.label:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=max(4, min(24, self.console.width - len(phase) - 32))),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}", markup=False),
            )
            self._progress = _Live(*columns, console=self.console, transient=True)
            self._task = self._progress.add_task(phase, total=steps, completed=done, left="")
            self._progress.start()

    def update(self, logged: LoggedStep) -> None:
        losses = [f"{name} {value:.1e}" for name, value in logged.losses.items()]
        self._show(logged.step, [f"active {sum(logged.active.values()):.1f}", *losses])

    def target(self, step: int, text: str) -> None:
        if step <= self._last:  # another attempt
            self._done, self._started = 0, self._shown
        self._show(step, text.split("  "), name="target step")

    def message(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            self._line(text)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._task = None, None

    def _show(self, step: int, state: Sequence[str], *, name: str = "step") -> None:
        self._last, self._shown = step, time.monotonic()
        rate = (self._shown - self._started) / max(1, step - self._done)
        seconds = round(rate * (self._steps - step))
        left = f"{seconds // 60}:{seconds % 60:02d} left"
        if self._progress is not None and self._task is not None:
            self._progress.state = packed(state, width=self.console.width)
            self._progress.update(self._task, completed=step, left=left)
        elif self._shown - self._printed >= self.seconds or step == self._steps:
            self._printed = self._shown
            width = self.console.width - len(self.label) - 2
            first, *more = packed([f"{name} {step}/{self._steps}", left, *state], width=width)
            for line in (first, *(f"  {each}" for each in more)):
                self._line(line)

    def _line(self, text: str) -> None:
        self.console.print(f"{self.label}{text}", highlight=False, markup=False, soft_wrap=True)


class _Live(Progress):
    """The bar, and lines of state under it."""

    state: Sequence[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(line, style="dim", no_wrap=True) for line in self.state)
