"""Several seeds of one configuration in one go, each in a process of its own."""

import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from paramlens.config import Config
from paramlens.errors import ConfigError, ParamLensError, RunInterrupted
from paramlens.layout import checkpoints, default_out, holds_toy, require_free
from paramlens.machine import free_cores
from paramlens.runs import decompose_config
from paramlens.tracking import Terminal

PROGRESS = 30.0
"""Seconds between lines of progress of one seed."""


def decompose_seeds(
    config: Config,
    count: int,
    *,
    out: str | Path | None = None,
    target: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Runs with seeds `config.seed` to `config.seed` + `count` - 1, as many at a time as cores are free; returns their directories.

    Each trains a target of its own, as it would alone, unless `target` names one for all, or with {seed} in it one for each. out: the
    folder of the run directories `s<seed>`; none: runs/<name>-s<seed> each. threads: as configured, or one where several run at a time,
    since threads that must wait for each other's cores lose more than they gain. resume: those that have a checkpoint go on at it, the
    others start.
    A seed that fails does not stop the others; its error is raised when all are done. A Ctrl-C ends all, those under way with a
    checkpoint. Raises as `decompose_config` does.
    """
    if count < 1:
        raise ConfigError(f"seeds {count}: give 1 or more")
    workers = min(count, max(1, free_cores() // (config.threads or 1)))
    shared = {"threads": 1} if config.threads is None and workers > 1 else {}
    jobs: list[_Job] = []
    for seed in range(config.seed, config.seed + count):
        each = config.model_copy(update={**shared, "seed": seed})
        path = default_out(each) if out is None else Path(out) / f"s{seed}"
        resumable = resume and bool(checkpoints(path))
        if not resumable:
            require_free(path, overwrite=overwrite)
        given = None if target is None else str(target).replace("{seed}", str(seed))
        if given is not None and resumable and holds_toy(Path(given)):
            given = None  # the run has it
        jobs.append(_Job(each, path, given, resumable, overwrite))
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(stop,))
    failures: list[ParamLensError | None] = []
    try:
        failures = list(pool.map(_run, jobs))
    except KeyboardInterrupt:
        stop.set()
    finally:
        pool.shutdown(cancel_futures=True)
    if stop.is_set():
        raise RunInterrupted
    if failed := [failure for failure in failures if failure is not None]:
        raise failed[0]
    return [job.path for job in jobs]


@dataclass(frozen=True)
class _Job:
    config: Config
    path: Path
    target: str | None
    resume: bool
    overwrite: bool


class _Worker:
    """What a worker process knows of the others: whether any was interrupted; and whether it has a job itself."""

    stop: Event
    working = False


def _start_worker(stop: Event) -> None:
    _Worker.stop = stop
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(_number: int, _frame: Any) -> None:
    """Ctrl-C reaches every process of the terminal; one without a job has nothing to end."""
    if _Worker.working:
        raise KeyboardInterrupt


def _run(job: _Job) -> ParamLensError | None:
    """One seed in its own process; what went wrong is returned, so that it reaches the parent beside the others' results."""
    if _Worker.stop.is_set():
        return None
    tracker = Terminal(seconds=PROGRESS, label=f"seed {job.config.seed}: ")
    _Worker.working = True
    try:
        decompose_config(job.config, out=job.path, target=job.target, resume=job.resume, overwrite=job.overwrite, tracker=tracker)
    except ParamLensError as error:
        return error
    except KeyboardInterrupt:
        _Worker.stop.set()
    finally:
        _Worker.working = False
    return None
