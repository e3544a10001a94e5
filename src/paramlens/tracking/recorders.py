"""The process that `trackers.SubprocessTracker` starts: it reads a run's numbers as lines of JSON and passes them to one library."""

import itertools
import json
import netrc
import os
import secrets
import signal
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from filelock import FileLock

from paramlens.fields import leaves
from paramlens.files.plain import read_json, write_json

PROJECT = "paramlens"
"""Project name in W&B and Trackio."""

LOCK_PATIENCE = 30.0
"""Seconds that the process of a resumed run waits for the process of the earlier run to finish writing."""


class Recorder(Protocol):
    """Records a run's numbers. It gets a folder, the run's name, its configuration and the number of steps done before."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], done: int) -> None: ...

    def record(self, step: int, values: Mapping[str, float], text: str) -> None:
        """Record the values of one step. text: the messages to the user."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Writes event files. A resumed run adds a session start, which makes TensorBoard drop what was logged after the checkpoint."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], done: int) -> None:  # noqa: ARG002
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        begun = any(folder.iterdir())
        self._event, self._writer = Event, EventFileWriter(str(folder))
        self._writer.add_event(Event(wall_time=time.time(), step=done + 1, session_log=SessionLog(status=SessionLog.START)))
        if not begun:
            self._add(0, hparams_pb(hyperparameters(config)))

    def record(self, step: int, values: Mapping[str, float], text: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.plugins.text.summary_v2 import text_pb

        if values:
            self._add(step, Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]))
        if text:
            self._add(step, text_pb("messages", text))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, summary: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))


class AppendingRecorder:
    """Base class for libraries that cannot remove steps. `run.json` in its folder has the run's id and the last recorded step.

    A resumed run repeats steps with the same values, so steps that are already recorded are skipped.
    """

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], done: int) -> None:  # noqa: ARG002  # required by the protocol
        self._file = folder / "run.json"
        known = read_json(self._file) if self._file.exists() else {"id": secrets.token_hex(4), "step": -1}
        self.id, self._step = known["id"], known["step"]
        self._run = self.begin(folder, name, dict(config))

    def begin(self, folder: Path, name: str, config: dict[str, Any]) -> Any:
        """Start the library's run, an object with `log` and `finish`."""
        raise NotImplementedError

    def record(self, step: int, values: Mapping[str, float], text: str) -> None:
        if step > self._step:
            self._run.log({**values, **({"messages": text} if text else {})}, step=step)
            self._step = step
            write_json(self._file, {"id": self.id, "step": step})

    def close(self) -> None:
        self._run.finish()


class WandB(AppendingRecorder):
    """Weights & Biases, offline unless WANDB_MODE is set or a user is logged in. Does not record console, code, packages or machine."""

    def begin(self, folder: Path, name: str, config: dict[str, Any]) -> Any:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        for kind in ("CACHE", "DATA", "ARTIFACT"):
            os.environ.setdefault(f"WANDB_{kind}_DIR", str(folder / "cache"))
        import wandb

        never = ("symlink", "save_code", "x_save_requirements")
        always = ("silent", "disable_git", "x_disable_meta", "x_disable_stats", "x_disable_machine_info")
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            id=self.id,
            resume="allow",
            dir=str(folder.parent),
            config=config,
            mode=None if os.environ.get("WANDB_MODE") or logged_in() else "offline",
            settings=wandb.Settings(console="off", **dict.fromkeys(never, False), **dict.fromkeys(always, True)),
        )


class Trackio(AppendingRecorder):
    """Trackio, with its database in the folder. Spaces or servers named in the environment are ignored."""

    def begin(self, folder: Path, name: str, config: dict[str, Any]) -> Any:
        for word in [word for word in os.environ if word.startswith("TRACKIO_")]:
            del os.environ[word]
        os.environ |= {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
        import trackio

        warnings.showwarning = _raise  # Trackio only warns if something cannot be written
        return trackio.init(PROJECT, name=name, config=config, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)


RECORDERS: dict[str, type[Recorder]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def main() -> None:
    """Record the lines of stdin until it ends, which it also does if the run is killed. On an error, print it and exit with 1."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    name, folder, run, done = sys.argv[1:]
    try:
        with FileLock(Path(folder).with_suffix(".lock"), timeout=LOCK_PATIENCE):
            config = json.loads(sys.stdin.readline())["config"]
            recorder = RECORDERS[name](Path(folder), run, config, int(done))
            for step, lines in itertools.groupby(map(json.loads, sys.stdin), key=lambda line: line["step"]):
                values, texts = {}, []
                for line in lines:
                    values |= line.get("values", {})
                    texts += [line["message"]] if "message" in line else []
                recorder.record(step, values, "\n".join(texts))
            recorder.close()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """A configuration's values under dotted names, in the form that TensorBoard takes: lists as text, no entry for None."""
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in leaves(config).items()
        if value is not None
    }


def logged_in() -> bool:
    """Whether W&B's key is in the environment or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    named = os.environ.get("NETRC")
    for file in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if host in netrc.netrc(file).hosts:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _raise(message: Warning | str, *_args: Any, **_more: Any) -> None:
    raise RuntimeError(str(message))
