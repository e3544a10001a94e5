"""Show a run's progress during training: the protocol of trackers, the terminal, and a tracker that combines several.

The terminal shows a live line with a bar; other outputs get plain lines. Both are on stderr, so that stdout is free for results.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from paramlens.config.model import Config
from paramlens.display.streams import ErrorConsole
from paramlens.display.tables import packed


@dataclass(frozen=True)
class LoggedStep:
    """One logged step: losses by name (reconstruction in nats), minimality's power p, and active subcomponents per position by site.

    width: w of `losses.smooth_minimality` at this step. None: the run is without that loss.
    """

    step: int
    losses: Mapping[str, float]
    total: float
    p: float
    lr: float
    active: Mapping[str, float]
    width: float | None = None

    def scalars(self) -> dict[str, float]:
        """All values in one flat mapping, with names such as `losses/<name>` and `active/<site>`. active: the sum over sites."""
        losses = {f"losses/{name}": value for name, value in self.losses.items()}
        active = {f"active/{name}": value for name, value in self.active.items()}
        annealed = {"p": self.p} | ({} if self.width is None else {"width": self.width})
        return {**losses, "total": self.total, **annealed, "lr": self.lr, **active, "active": sum(self.active.values())}


@runtime_checkable
class Tracker(Protocol):
    """Follows a run. Its methods are called once per phase (`start`), at logged steps (`update`), after evaluations and at the end.

    `start` gets the run directory, the configuration and the number of steps done before. After a resume, later steps are reported again.
    `message` gets texts for the user, and may be called before `start`.
    """

    def start(self, phase: str, *, steps: int, done: int, path: Path, config: Config) -> None: ...

    def update(self, logged: LoggedStep) -> None: ...

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class TargetTracker(Tracker, Protocol):
    """A tracker that also follows the training of a toy target: `target` is called at its checks, between `start_target` and `close`.

    A step that is not larger than the last one starts another attempt. Other trackers get each check as a message.
    """

    def start_target(self, *, steps: int) -> None: ...

    def target(self, step: int, text: str) -> None: ...


def is_tracker(value: Any) -> TypeGuard[Tracker]:
    """Whether `value` has the methods of `Tracker`, its own or by `__getattr__`, which isinstance no longer asks since Python 3.12."""
    return all(callable(getattr(value, name, None)) for name in ("start", "update", "evaluated", "message", "close"))


def follows_targets(tracker: Tracker) -> TypeGuard[TargetTracker]:
    """Whether a tracker has the methods of `TargetTracker` too."""
    return all(callable(getattr(tracker, name, None)) for name in ("start_target", "target"))


def report_target(tracker: Tracker, step: int, text: str) -> None:
    """Pass a check of the target's training to a tracker, as a message if the tracker is not a `TargetTracker`."""
    if follows_targets(tracker):
        tracker.target(step, text)
    else:
        tracker.message(f"target step {step}  {text}")


class Silent:
    """A tracker that does nothing."""

    def start(self, phase: str, *, steps: int, done: int, path: Path, config: Config) -> None: ...

    def update(self, logged: LoggedStep) -> None: ...

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class Terminal:
    """Shows losses, active counts and time left: in a live bar on a terminal, otherwise in a line at most every `seconds` seconds.

    label: start of each line; with a label there is no live bar. Text that does not fit the width continues in the line below.
    """

    def __init__(self, console: Console | None = None, *, seconds: float = 5.0, label: str = "") -> None:
        self.console = console or ErrorConsole()
        self.seconds, self.label = seconds, label
        self._progress: _Live | None = None
        self._task: TaskID | None = None
        self._steps, self._done, self._started, self._printed = 0, 0, 0.0, -float("inf")
        self._last, self._shown = 0, 0.0

    def start(self, phase: str, *, steps: int, done: int, path: Path, config: Config) -> None:  # noqa: ARG002  # the protocol's
        self._begin(phase, steps=steps, done=done)

    def start_target(self, *, steps: int) -> None:
        self._begin("training the target", steps=steps, done=0)

    def _begin(self, phase: str, *, steps: int, done: int) -> None:
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

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing: evaluations go to metrics.jsonl, and the terminal shows the losses."""

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
    """The bar, and lines with the run's state below it."""

    state: Sequence[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(line, style="dim", no_wrap=True) for line in self.state)


class Fanout:
    """Combines several trackers. If one raises, the others get its error as a message, and the run goes on without it."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = {id(tracker): tracker for tracker in trackers}

    def start(self, phase: str, *, steps: int, done: int, path: Path, config: Config) -> None:
        self._each(lambda tracker: tracker.start(phase, steps=steps, done=done, path=path, config=config))

    def start_target(self, *, steps: int) -> None:
        self._each(lambda tracker: tracker.start_target(steps=steps) if follows_targets(tracker) else None)

    def target(self, step: int, text: str) -> None:
        self._each(lambda tracker: report_target(tracker, step, text))

    def update(self, logged: LoggedStep) -> None:
        self._each(lambda tracker: tracker.update(logged))

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.evaluated(step, metrics))

    def message(self, text: str) -> None:
        self._each(lambda tracker: tracker.message(text))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> bool:
        """Call every tracker. Returns True if at least one did not raise."""
        taken = False
        for key, tracker in tuple(self._trackers.items()):
            if key not in self._trackers:  # it raised when it got the message about another tracker's error
                continue
            try:
                call(tracker)
                taken = True
            except Exception as error:  # a user's tracker may raise anything
                del self._trackers[key]
                name = type(tracker).__name__ if type(tracker).__str__ is object.__str__ else str(tracker)
                text = f"{name}: {str(error) or type(error).__name__}; the run goes on without it"
                if not self._each(lambda other, text=text: other.message(text)):
                    ErrorConsole().print(text, highlight=False, markup=False, soft_wrap=True)
        return taken
