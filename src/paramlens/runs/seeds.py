"""Run several seeds of one configuration, each in its own process."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramlens import errors
from paramlens.config.file import make_config
from paramlens.config.model import Config
from paramlens.errors import ConfigError, ParamLensError, RunInterrupted, Terminated
from paramlens.fields import expand_home
from paramlens.files.plain import read_json, write_json
from paramlens.kernels.resources import usable_cores
from paramlens.runs.decompose import decompose_config
from paramlens.runs.layout import default_out, holds_toy, is_begun, is_run, require_free
from paramlens.tracking.signals import interrupts, own_session, request_end, terminate_self, termination
from paramlens.tracking.tracker import Silent, Terminal
from paramlens.tracking.trackers import select_trackers

PROGRESS = 30.0
"""Seconds between progress lines of one seed."""


def decompose_seeds(
    config: Config,
    count: int,
    *,
    out: str | Path | None = None,
    target: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    track: Sequence[str] = (),
) -> list[Path]:
    """Run `count` seeds, starting at `config.seed`, as many at a time as the usable cores allow. Returns their run directories.

    target: as for `decompose_config`; {seed} in it is replaced by the seed. Defaults to training a target for each seed.
    out: the folder of the run directories `s<seed>`. Defaults to runs/<name>-s<seed> for each seed.
    resume: continue the runs that have begun and start the others.
    track: names of trackers that every seed uses besides the terminal.
    If several seeds run at a time and `threads` is not set, each uses one thread, which is faster than more threads on shared cores.
    A seed that fails does not stop the others; its error is raised when all have ended. After a Ctrl-C or SIGTERM, or if this process
    ends, all seeds save a checkpoint and end; a second signal ends them at once. Raises the errors of `decompose_config`.
    """
    if count < 1:
        raise ConfigError(f"seeds {count}: give 1 or more")
    select_trackers(track, first=Silent())
    workers = min(count, max(1, usable_cores() // (config.threads or 1)))
    shared = {"threads": 1} if config.threads is None and workers > 1 else {}
    jobs: list[_Job] = []
    for seed in range(config.seed, config.seed + count):
        each = config.model_copy(update={**shared, "seed": seed})
        path = default_out(each) if out is None else Path(expand_home(str(out))) / f"s{seed}"
        resumable = resume and is_begun(path)
        anew = overwrite or (resume and is_run(path) and not resumable)  # a run that was stopped before its first step
        if not resumable:
            require_free(path, overwrite=anew)
        given = None if target is None else expand_home(str(target).replace("{seed}", str(seed)))
        if given is not None and resumable and holds_toy(Path(given)):
            given = None  # the run directory already has it
        jobs.append(_Job(each, path, given, resumable, anew and not resumable, tuple(track)))
    if failed := [failure for failure in _run_all(jobs, workers) if failure is not None]:
        raise failed[0]
    return [job.path for job in jobs]


@dataclass(frozen=True)
class _Job:
    config: Config
    path: Path
    target: str | None
    resume: bool
    overwrite: bool
    track: tuple[str, ...]


def _run_all(jobs: Sequence[_Job], workers: int) -> list[ParamLensError | None]:
    """The error of each job, or None. At most `workers` jobs run at a time. After a signal, raises `RunInterrupted` when all have ended."""
    waiting, failures = list(range(len(jobs))), list[ParamLensError | None]([None] * len(jobs))
    running: dict[int, subprocess.Popen[str]] = {}
    told = False
    with tempfile.TemporaryDirectory(prefix="paramlens-") as folder, interrupts() as interrupted:
        try:
            while waiting or running:
                number = interrupted()
                if number and not told:
                    waiting, told = [], True
                    for process in running.values():
                        request_end(process, number)
                while waiting and len(running) < workers:
                    index = waiting.pop(0)
                    running[index] = _start(jobs[index], Path(folder) / f"{index}.json")
                for index in [index for index, process in running.items() if process.poll() is not None]:
                    failures[index] = _failure(jobs[index], running.pop(index))
                time.sleep(0.05)
        finally:
            for process in running.values():  # after a second signal, which also ends this process at once
                process.terminate()
                process.terminate()
                process.communicate()
    if number := interrupted():
        raise RunInterrupted(number)
    return failures


def _start(job: _Job, file: Path) -> subprocess.Popen[str]:
    """Start a job in its own process and session, so that a Ctrl-C in the terminal reaches it only through this process."""
    settings = {"path": str(job.path), "target": job.target, "resume": job.resume, "overwrite": job.overwrite, "track": job.track}
    write_json(file, {"config": job.config.model_dump(mode="json"), **settings})
    quietly = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)"  # no traceback for a Ctrl-C while torch is imported
    command = [sys.executable, "-c", f"{quietly}; from paramlens.runs.seeds import run_job; run_job()", str(file)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **own_session())


def _failure(job: _Job, process: subprocess.Popen[str]) -> ParamLensError | None:
    said, _ = process.communicate()
    if process.returncode == 0 or any(process.returncode in (128 + number, -number) for number in (signal.SIGINT, signal.SIGTERM)):
        return None
    try:
        told = json.loads(said)
        return getattr(errors, told["kind"])(told["message"])
    except (ValueError, KeyError, TypeError):
        return ParamLensError(f"{job.path}: seed {job.config.seed} ended with exit code {process.returncode}; its own messages say why")


def run_job() -> None:
    """Run one seed in this process. An error is sent to the parent as JSON. If the parent ends, this process ends as by SIGTERM."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job: dict[str, Any] = read_json(Path(sys.argv[1]))
    config = make_config(job.pop("config"))
    terminal = Terminal(seconds=PROGRESS, label=f"seed {config.seed}: ")
    try:
        tracker = select_trackers(job.pop("track"), first=terminal)
        with termination():
            decompose_config(config, out=job.pop("path"), tracker=tracker, **job)
    except ParamLensError as error:
        print(json.dumps({"kind": type(error).__name__, "message": str(error)}))
        sys.exit(error.exit_code)
    except KeyboardInterrupt as stopped:
        sys.exit(stopped.exit_code if isinstance(stopped, Terminated) else 130)


def _end_with_parent() -> None:
    while os.read(0, 1):  # ends when the parent's end of the pipe is closed
        pass
    terminate_self()
