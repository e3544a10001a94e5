import io
from pathlib import Path

import pytest
from rich.console import Console

from conftest import TINY
from paramlens.configfile import make_config
from paramlens.trackers import Beside
from paramlens.tracking import Fanout, LoggedStep, Silent, Terminal, Tracker


def logged(step: int) -> LoggedStep:
    return LoggedStep(step=step, losses={"recon": 1.5e-3, "minimality": 0.2}, total=0.3, p=0.5, lr=1e-3, active={"a": 1.25, "b": 2.0})


def written(terminal: bool, seconds: float = 0.0) -> str:
    stream = io.StringIO()
    tracker = Terminal(Console(file=stream, force_terminal=terminal, width=100), seconds=seconds)
    tracker.message("before")
    tracker.start("decomposing", steps=30, done=0, path=Path("run"), config=make_config(TINY))
    for step in (10, 20, 30):
        tracker.update(logged(step))
    tracker.message("after [not markup]")
    tracker.close()
    return stream.getvalue()


def test_plain_lines_hold_losses_active_counts_and_time_left():
    lines = written(terminal=False).splitlines()
    assert lines[0] == "before"
    assert lines[1].startswith("step 10/30  0:00 left  active 3.2  recon 1.5e-03  minimality 2.0e-01")
    assert [line.split()[1] for line in lines[1:4]] == ["10/30", "20/30", "30/30"]
    assert lines[-1] == "after [not markup]"


def test_plain_lines_are_few_and_the_last_step_is_always_told():
    steps = [line.split()[1] for line in written(terminal=False, seconds=1e6).splitlines() if line.startswith("step")]
    assert steps == ["10/30", "30/30"]


def test_live_line_on_a_terminal():
    text = written(terminal=True)
    assert "decomposing" in text
    assert "30/30" in text
    assert "recon 1.5e-03" in text
    assert "active 3.2" in text
    assert "after [not markup]" in text


@pytest.mark.parametrize("tracker", [Silent(), Terminal(Console(file=io.StringIO())), Fanout(Silent()), Beside("wandb")])
def test_all_follow_the_protocol(tracker):
    assert isinstance(tracker, Tracker)
