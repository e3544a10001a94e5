import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from conftest import TINY
from paramlens.config.file import make_config
from paramlens.errors import ConfigError
from paramlens.files.plain import read_json
from paramlens.runs.decompose import decompose, decompose_config
from paramlens.runs.rundir import Run
from paramlens.tracking.tracker import Fanout, LoggedStep, Silent, TargetTracker, Terminal, Tracker
from paramlens.tracking.trackers import SubprocessTracker


def logged(step: int) -> LoggedStep:
    return LoggedStep(step=step, losses={"recon": 1.5e-3, "minimality": 0.2}, total=0.3, p=0.5, lr=1e-3, active={"a": 1.25, "b": 2.0})


MANY = dict.fromkeys(("stochastic_recon", "stochastic_recon_layerwise", "recon", "faithfulness", "minimality"), 0.0015)


def written(terminal: bool, seconds: float = 0.0, width: int = 80, label: str = "", losses=None) -> str:
    stream = io.StringIO()
    tracker = Terminal(Console(file=stream, force_terminal=terminal, width=width), seconds=seconds, label=label)
    tracker.message("before")
    tracker.start("decomposing", steps=30, done=0, path=Path("run"), config=make_config(TINY))
    for step in (10, 20, 30):
        tracker.update(replace(logged(step), losses=losses) if losses else logged(step))
    tracker.message("after [not markup]")
    tracker.close()
    return stream.getvalue()


def on_screen(text: str) -> list[str]:
    """What a terminal shows of it, line by line, control sequences taken out."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))


def test_plain_lines_hold_losses_active_counts_and_time_left():
    lines = written(terminal=False).splitlines()
    assert lines[0] == "before"
    assert lines[1].startswith("step 10/30  0:00 left  active 3.2  recon 1.5e-03  minimality 2.0e-01")
    assert [line.split()[1] for line in lines[1:4]] == ["10/30", "20/30", "30/30"]
    assert lines[-1] == "after [not markup]"


def test_plain_lines_are_few_and_the_last_step_is_always_told():
    steps = [line.split()[1] for line in written(terminal=False, seconds=1e6).splitlines() if line.startswith("step")]
    assert steps == ["10/30", "30/30"]


def test_live_lines_on_a_terminal_hold_all_of_it():
    text = written(terminal=True)
    assert "decomposing" in text
    assert "30/30" in text
    assert "0:00 left" in text
    assert "active 3.2  recon 1.5e-03  minimality 2.0e-01" in text
    assert "after [not markup]" in text


@pytest.mark.parametrize(("terminal", "label"), [(True, ""), (False, ""), (True, "seed 3: "), (False, "seed 3: ")])
@pytest.mark.parametrize("width", [80, 60])
def test_no_line_runs_over_the_width_and_no_loss_is_left_out(terminal, label, width):
    text = written(terminal=terminal, width=width, label=label, losses=MANY)
    assert max(map(len, on_screen(text))) <= width
    for name in MANY:
        assert f"{name} 1.5e-03" in text
    if label:
        assert all(line.startswith(label) for line in text.splitlines())


@pytest.mark.parametrize("terminal", [True, False])
def test_training_of_the_target_shows_steps_and_time_left(terminal, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("paramlens.tracking.tracker.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    stream = io.StringIO()
    tracker = Terminal(Console(file=stream, force_terminal=terminal, width=80), seconds=0)
    tracker.start_target(steps=400)
    tracker.target(100, "loss 2.00e+00 nats  accuracy 0.1000")
    tracker.target(200, "loss 1.00e+00 nats  accuracy 0.5000")
    tracker.target(100, "loss 3.00e+00 nats  accuracy 0.2000")
    tracker.close()
    text = stream.getvalue()
    assert "accuracy 0.2000" in text
    assert max(map(len, on_screen(text))) <= 80
    if terminal:
        assert "training the target" in text
    else:
        assert text.splitlines()[0] == "target step 100/400  0:30 left  loss 2.00e+00 nats  accuracy 0.1000"
        assert [line.split("left")[0] for line in text.splitlines()[1:]] == ["target step 200/400  0:20 ", "target step 100/400  0:30 "]


@pytest.mark.parametrize("tracker", [Silent(), Terminal(Console(file=io.StringIO())), Fanout(Silent()), SubprocessTracker("wandb")])
def test_all_follow_the_protocol(tracker):
    assert isinstance(tracker, Tracker)


def test_who_follows_the_target():
    assert isinstance(Fanout(Silent()), TargetTracker)
    assert isinstance(Terminal(Console(file=io.StringIO())), TargetTracker)
    assert not isinstance(Silent(), TargetTracker)


class Notes(Silent):
    """Remembers what a person would have read."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def parts(run: Run) -> dict[str, torch.Tensor]:
    return {f"{kind}{name}": value for kind in ("U", "V") for name, value in getattr(run.decomposition, kind).items()}


def toy() -> tuple[nn.Module, list[torch.Tensor]]:
    """A model and a batch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)), [torch.randint(5, (2, 3))]


HOOKS = ("start_target", "target", "start", "update", "evaluated", "message", "close")


class Raises(Terminal):
    """A tracker that raises in one of its methods, and counts how often it is called there."""

    def __init__(self, hook: str) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.calls = 0

        def raising(*_args: object, **_fields: object) -> None:
            self.calls += 1
            raise RuntimeError("broken")

        setattr(self, hook, raising)


@pytest.mark.parametrize(
    ("hook", "beside"),
    [
        *(pytest.param(hook, False, marks=[] if hook in ("start", "evaluated", "close") else pytest.mark.slow) for hook in HOOKS),
        ("update", True),
        pytest.param("close", True, marks=pytest.mark.slow),
    ],
)
def test_a_run_ends_as_it_should_whatever_its_tracker_raises(hook, beside, tmp_path, tiny_run, capsys):
    notes, broken = Notes(), Raises(hook)
    run = decompose_config(make_config(TINY), out=tmp_path / "run", tracker=Fanout(broken, notes) if beside else broken)
    assert (run.status, run.info["steps"]) == ("finished", 12)
    assert broken.calls == 1
    told = notes.texts if beside else capsys.readouterr().err.splitlines()
    assert [text for text in told if "goes on without" in text] == ["Raises: broken; the run goes on without it"]
    assert all(value.equal(parts(tiny_run)[name]) for name, value in parts(run).items())


def test_two_that_fail_at_each_other_are_both_told_and_left_behind(capsys):
    first, second = Raises("update"), Raises("message")
    fan = Fanout(first, second)
    fan.update(logged(1))
    fan.update(logged(2))
    assert (first.calls, second.calls) == (1, 1)
    assert capsys.readouterr().err.count("goes on without") == 2


def test_an_interrupt_while_a_tracker_closes_leaves_the_status_right(tmp_path):
    class Impatient(Silent):
        def close(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decompose(*toy(), out=tmp_path / "run", steps=2, C=2, gamma={"kind": "vector", "d_gate": 2}, tracker=Impatient())
    assert read_json(tmp_path / "run/run.json")["status"] == "finished"


def test_what_is_no_tracker_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="tracker: int is not a tracker, which has the methods start, update,"):
        decompose(*toy(), out=tmp_path / "run", tracker=3)
    assert not (tmp_path / "run").exists()
