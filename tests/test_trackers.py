"""TensorBoard, W&B and Trackio beside real runs: what they keep is read back by their own means, or from their files."""

import json
import os
import signal
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from wandb.proto.wandb_internal_pb2 import Record

from conftest import TINY, tiny_with
from paramlens.cli.main import main
from paramlens.config.file import dump_config, make_config
from paramlens.errors import ConfigError
from paramlens.files.plain import read_json
from paramlens.runs.decompose import decompose_config
from paramlens.runs.rundir import Run
from paramlens.runs.seeds import decompose_seeds
from paramlens.runs.verification import verify
from paramlens.tracking import recorders, trackers
from paramlens.tracking.tracker import Fanout, LoggedStep, Silent, Terminal
from paramlens.tracking.trackers import LIBRARIES, SubprocessTracker, as_tracker, select_trackers


class Notes(Silent):
    """Remembers what a person would have read."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty home, in which nobody is logged in to anything."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_", "XDG_"))]:
            patch.delenv(name)
        patch.setattr(trackers, "PATIENCE", 3600.0)  # how long a library needs to be imported depends on the machine
        yield folder


@pytest.fixture(scope="module")
def tracked(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Notes]:
    """The tiny run again, followed by all three; read only."""
    notes = Notes()
    run = decompose_config(
        make_config(TINY), out=tmp_path_factory.mktemp("tracked") / "tiny", tracker=select_trackers(list(LIBRARIES), first=notes)
    )
    return run, notes


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny run made here too: where shapes are checked, the check draws from Python's random numbers, whose state is saved."""
    return decompose_config(make_config(TINY), out=tmp_path_factory.mktemp("untracked") / "tiny")


def expected(run: Run) -> dict[tuple[int, str], float]:
    """(step, name) → value, from metrics.jsonl alone."""
    values: dict[tuple[int, str], float] = {}
    for line in run.metrics:
        step = line["step"]
        values |= {(step, f"evaluation/{name}"): value for name, value in line.get("evaluation", {}).items()}
        if "losses" in line:
            values |= {(step, f"losses/{name}"): value for name, value in line["losses"].items()}
            values |= {(step, f"active/{name}"): value for name, value in line["active"].items()}
            values |= {(step, name): line[name] for name in ("total", "p", "lr")} | {(step, "active"): sum(line["active"].values())}
    return values


def tensorboard(run: Run) -> dict[tuple[int, str], float]:
    accumulator = EventAccumulator(str(run.path / "tracking/tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    listed = [((event.step, tag), event.value) for tag in accumulator.Tags()["scalars"] for event in accumulator.Scalars(tag)]
    assert len(listed) == len(dict(listed)), "no point twice"
    return dict(listed)


def wandb_records(run: Run) -> list[Any]:
    """Records of the offline runs, oldest first: LevelDB's log, blocks of 32 KiB after 7 bytes of header, one protobuf each."""
    found = []
    for file in sorted((run.path / "tracking/wandb").glob("offline-run-*/run-*.wandb")):
        data, at, whole = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                found.append(Record.FromString(whole))
                whole = b""
    return found


def wandb(run: Run) -> dict[tuple[int, str], float]:
    rows = [record.history for record in wandb_records(run) if record.WhichOneof("record_type") == "history"]
    items = [((row.step.num, item.nested_key[0]), json.loads(item.value_json)) for row in rows for item in row.item]
    listed = [(key, value) for key, value in items if key[1] != "messages" and not key[1].startswith("_")]
    assert len(listed) == len(dict(listed)), "no point twice"
    return dict(listed)


def trackio(run: Run) -> dict[tuple[int, str], float]:
    with closing(sqlite3.connect(run.path / "tracking/trackio/paramlens.db")) as database:
        rows = database.execute("select run_id, step, metrics from metrics").fetchall()
    assert len({identity for identity, _, _ in rows}) == 1, "one run"
    listed = [((step, name), value) for _, step, row in rows for name, value in json.loads(row).items() if name != "messages"]
    assert len(listed) == len(dict(listed)), "no point twice"
    return dict(listed)


def require_all(run: Run) -> None:
    """All three hold the numbers of metrics.jsonl; TensorBoard in single precision."""
    values = expected(run)
    assert wandb(run) == values
    assert trackio(run) == values
    assert tensorboard(run) == {key: np.float32(value) for key, value in values.items()}


def test_all_three_hold_the_metrics(tracked):
    run, notes = tracked
    require_all(run)
    assert not [text for text in notes.texts if "goes on without" in text]
    assert {step for step, name in expected(run) if name.startswith("evaluation/")} == {6, 12}


def test_the_configuration_is_there_as_hyperparameters(tracked):
    run, _ = tracked
    config = run.config.model_dump(mode="json")
    accumulator = EventAccumulator(str(run.path / "tracking/tensorboard"))
    accumulator.Reload()
    data = HParamsPluginData.FromString(accumulator.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    found = data.session_start_info.hparams
    assert (found["optim.lr"].number_value, found["gamma.kind"].string_value) == (config["optim"]["lr"], "attention")
    assert json.loads(found["sites"].string_value) == config["sites"]
    begun = next(record.run for record in wandb_records(run) if record.WhichOneof("record_type") == "run")
    assert {item.key: json.loads(item.value_json) for item in begun.config.update}.items() >= config.items()
    with closing(sqlite3.connect(run.path / "tracking/trackio/paramlens.db")) as database:
        [(name, kept)] = database.execute("select run_name, config from configs").fetchall()
    assert name == "tiny"
    assert json.loads(kept).items() >= config.items()


def test_what_was_said_of_the_target_is_there_too(tracked):
    run, notes = tracked
    accumulator = EventAccumulator(str(run.path / "tracking/tensorboard"))
    accumulator.Reload()
    [event] = accumulator.Tensors("messages")
    assert event.tensor_proto.string_val[0].decode() == "\n".join(notes.texts)
    assert notes.texts[0].startswith("training the target")


def test_nothing_is_written_elsewhere(tracked, home):
    run, _ = tracked
    assert list(home.rglob("*")) == []
    files = {path.name for path in (run.path / "tracking/wandb").rglob("*") if path.is_file()}
    assert not files & {"requirements.txt", "wandb-metadata.json", "output.log"}


def test_the_run_is_the_same_to_the_byte(tracked, untracked):
    """But for what run.json says of times, and the tracking itself."""
    run, _ = tracked
    ours, theirs = (
        {name: path.read_bytes() for path in each.path.rglob("*") if path.is_file() and (name := path.relative_to(each.path).as_posix())}
        for each in (run, untracked)
    )
    ours = {name: content for name, content in ours.items() if not name.startswith("tracking/")}
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == ["run.json"]
    assert verify(run.path).whole


class Failure(BaseException):
    """Not an `Exception`, which a run would go on without."""


class Stop(Silent):
    """An error at a step, as if the machine had failed there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def update(self, logged: LoggedStep) -> None:
        if logged.step == self.step:
            raise Failure


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_place(home, tmp_path):
    """Stopped two logged steps after its checkpoint: those come again, and stand there once."""
    config = tiny_with(log_every=1)
    with pytest.raises(Failure):
        decompose_config(config, out=tmp_path / "run", tracker=select_trackers(list(LIBRARIES), first=Stop(7)))
    identity = read_json(tmp_path / "run/tracking/wandb/run.json")
    assert identity["step"] == 6
    run = decompose_config(config, out=tmp_path / "run", resume=True, tracker=select_trackers(list(LIBRARIES), first=Silent()))
    require_all(run)
    begun = [record.run.run_id for record in wandb_records(run) if record.WhichOneof("record_type") == "run"]
    assert set(begun) == {identity["id"]}
    assert len(list((run.path / "tracking/wandb").glob("offline-run-*"))) == 2
    again = decompose_config(config, out=tmp_path / "run", overwrite=True)
    assert not (again.path / "tracking").exists()


def test_a_run_that_is_killed_leaves_its_numbers(home, tmp_path):
    """The other side's end is the end of the lines: what was told before is kept."""
    beside = SubprocessTracker("trackio")
    beside.start("decomposing", steps=9, done=0, path=tmp_path, config=make_config(TINY))
    beside.update(LoggedStep(3, {"recon": 0.5}, 0.5, 1.0, 0.1, {"a": 2.0}))
    process = beside._process
    beside._lines.put(None)  # as the pipe closes when this process dies
    assert process is not None
    assert process.wait() == 0
    with closing(sqlite3.connect(tmp_path / "tracking/trackio/paramlens.db")) as database:
        [(step, row)] = database.execute("select step, metrics from metrics").fetchall()
    assert (step, json.loads(row)["active/a"]) == (3, 2.0)


class Failing(Silent):
    def update(self, logged: LoggedStep) -> None:
        if logged.step >= 6:
            raise OSError(28, "No space left on device")


def parts(run: Run) -> dict[str, Any]:
    return {f"{kind}{name}": value for kind in ("U", "V") for name, value in getattr(run.decomposition, kind).items()}


def test_a_tracker_that_fails_is_told_once_and_left_behind(tmp_path, tiny_run):
    notes = Notes()
    run = decompose_config(make_config(TINY), out=tmp_path / "run", tracker=Fanout(notes, Failing()))
    assert [text for text in notes.texts if "Failing" in text] == [
        "Failing: [Errno 28] No space left on device; the run goes on without it"
    ]
    assert all(value.equal(parts(tiny_run)[name]) for name, value in parts(run).items())


class KillsAt(Notes):
    """Kills the process beside the run at its second logged step."""

    beside: SubprocessTracker

    def update(self, logged: LoggedStep) -> None:
        if logged.step == 6:
            assert self.beside._process is not None
            self.beside._process.kill()
            self.beside._process.wait()


def test_a_process_that_dies_is_told_once(home, tmp_path, tiny_run):
    notes = KillsAt()
    notes.beside = SubprocessTracker("tensorboard")
    run = decompose_config(make_config(TINY), out=tmp_path / "run", tracker=Fanout(notes, notes.beside))
    [told] = [text for text in notes.texts if "goes on without" in text]
    assert told.startswith("TensorBoard: ended with exit code -9 (see ")
    assert all(value.equal(parts(tiny_run)[name]) for name, value in parts(run).items())


def test_a_library_that_raises_says_why(home, tmp_path):
    """A file where W&B's folder is to be, which somebody put there."""
    (tmp_path / "tracking/trackio").mkdir(parents=True)
    (tmp_path / "tracking/trackio/run.json").write_text("{")
    notes, beside = Notes(), SubprocessTracker("trackio")
    fan = Fanout(notes, beside)
    fan.start("decomposing", steps=9, done=0, path=tmp_path, config=make_config(TINY))
    fan.close()
    [told] = notes.texts
    assert told.startswith("Trackio: ended with exit code 1 (RunDirError: ")
    assert "run.json: not JSON" in told
    assert f"see {tmp_path / 'tracking/trackio.log'}" in told


def test_one_that_hangs_does_not_hold_the_run(home, tmp_path, monkeypatch):
    """Stopped in its tracks: more lines than a pipe takes are not waited for, nor is its end; else this test would not end."""
    monkeypatch.setattr(trackers, "PATIENCE", 0.5)
    notes, beside = Notes(), SubprocessTracker("tensorboard")
    fan = Fanout(notes, beside)
    fan.start("decomposing", steps=9, done=0, path=tmp_path, config=make_config(TINY))
    process = beside._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    for step in range(3000):
        fan.update(LoggedStep(step, {"recon": 0.5}, 0.5, 1.0, 0.1, {f"site{i}": 2.0 for i in range(10)}))
    fan.close()
    assert process.returncode == -9
    [told] = notes.texts
    assert told.startswith("TensorBoard: had not finished 0.5 s after the run")


def test_what_is_not_there_is_refused_with_a_remedy(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="track 'mlflow': no such tracker; there are tensorboard, wandb, trackio"):
        select_trackers(["tensorboard", "mlflow"], first=Silent())
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"track wandb: Weights & Biases is not installed; pip install 'paramlens\[wandb\]'"):
        select_trackers("wandb", first=Silent())
    monkeypatch.undo()
    assert main(["decompose", "induction-quick", "--out", str(tmp_path / "x"), "--track", "mlflow"]) == 2
    with pytest.raises(ConfigError, match="track 'mlflow'"):
        decompose_config(make_config(TINY), out=tmp_path / "x", tracker="mlflow")
    with pytest.raises(ConfigError, match="track 'mlflow'"):
        decompose_seeds(make_config(TINY), 2, out=tmp_path / "x", track=["mlflow"])
    assert not (tmp_path / "x").exists()


def test_a_folder_of_the_same_name_is_no_library(monkeypatch, tmp_path):
    """W&B makes folders called wandb where it runs by itself."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "notalibrary").mkdir()
    monkeypatch.setitem(trackers.LIBRARIES, "notalibrary", "Nothing")
    with pytest.raises(ConfigError, match="Nothing is not installed"):
        select_trackers("notalibrary", first=Silent())


def test_trackers_as_an_argument():
    assert isinstance(as_tracker(None), Silent)
    own = Notes()
    assert isinstance(fan := as_tracker(own), Fanout)
    assert as_tracker(fan) is fan
    assert isinstance(named := as_tracker(["wandb", "wandb"]), Fanout)
    assert [type(each) for each in named._trackers.values()] == [Terminal, SubprocessTracker]


@pytest.mark.slow
def test_the_command_and_seeds(home, tmp_path, tiny_run, capsys):
    """Every seed is followed, in its own run directory."""
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(make_config(TINY)), encoding="utf-8")
    words = ["decompose", str(file), "--target", str(tiny_run.path), "--track", "tensorboard", "trackio", "--json"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    assert main([*words, "--seeds", "1", "--out", str(tmp_path / "seeds")]) == 0
    capsys.readouterr()
    for path in (tmp_path / "one", tmp_path / "seeds/s0"):
        assert {entry.name for entry in (path / "tracking").iterdir() if entry.is_dir()} == {"tensorboard", "trackio"}
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        with closing(sqlite3.connect(path / "tracking/trackio/paramlens.db")) as database:
            kept = {step: json.loads(row) for step, row in database.execute("select step, metrics from metrics")}
        assert [kept[line["step"]]["total"] for line in lines if "total" in line] == [line["total"] for line in lines if "total" in line]


def test_who_is_logged_in(home, monkeypatch):
    assert not recorders.logged_in()
    (home / ".netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    try:
        assert recorders.logged_in()
        monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
        assert not recorders.logged_in()
    finally:
        (home / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert recorders.logged_in()
