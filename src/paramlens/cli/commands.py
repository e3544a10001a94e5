"""The commands other than analyses. Each is a function: its parameters are the options, its docstring is the help text."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paramlens
from paramlens.analysis.commands.agreement import AgreementAnalysis
from paramlens.analysis.commands.circuit import CircuitAnalysis
from paramlens.baselines.bench_command import bench
from paramlens.cli.parameters import DEMO_CONFIG, run_directory
from paramlens.config.file import load_config
from paramlens.config.model import Config
from paramlens.display.outcome import Outcome
from paramlens.display.streams import ErrorConsole
from paramlens.display.verdicts import failures, verdict_table
from paramlens.errors import ConfigError
from paramlens.files.plain import read_json
from paramlens.runs.layout import RUNS, default_out, is_begun, is_run, require_free, require_run


def demo(*, seed: int = 0, out: Path | None = None, overwrite: bool = False) -> Outcome:
    """Train the induction target, decompose it, print Table 1 and write report.html.

    Args:
        seed: Seed of the target and of the decomposition.
        out: Run directory. Defaults to runs/demo-s<seed>.
        overwrite: Replace an existing run.
    """
    config = load_config(DEMO_CONFIG, overrides={"seed": seed, "name": "demo"})
    path = out or default_out(config)
    stderr = ErrorConsole()
    if not overwrite and _is_finished(path, config):
        stderr.print(f"{path} is finished already; --overwrite makes it anew", highlight=False, markup=False)
    else:
        stderr.print(f"{path}: the induction circuit from nothing, seed {seed}", highlight=False, markup=False, soft_wrap=True)
        from paramlens.tracking.tracker import Terminal

        resume = is_begun(path) and not overwrite
        overwrite = overwrite or (is_run(path) and not resume)  # an earlier demo stopped before its first step
        paramlens.decompose_config(config, out=path, resume=resume, overwrite=overwrite, tracker=Terminal(stderr))
    run = paramlens.open_run(path)
    found, page = CircuitAnalysis().compute_and_keep(run), paramlens.report(path)
    return Outcome({**_run_document(run), "page": str(page), "circuit": found.document}, [*found.shown, f"page: {page}"])


def _is_finished(path: Path, config: Config) -> bool:
    there = (path / "run.json").is_file() and read_json(path / "run.json").get("status") == "finished"
    return there and load_config(path / "config.yaml") == config


def train_target(config: Config, /, *, out: Path | None = None, overwrite: bool = False) -> Outcome:
    """Train a toy target and save it.

    Args:
        config: Shipped name or YAML path, as CONFIG.
        out: Directory of the target. Defaults to runs/<name>-target-s<seed>.
        overwrite: Replace an existing target.
    """
    from paramlens.runs.target_training import train_target as train
    from paramlens.tracking.tracker import Terminal

    path = out or Path(RUNS) / f"{config.name}-target-s{config.seed}"
    history = train(config, path, overwrite=overwrite, tracker=Terminal())
    document = {"target": str(path), "converged": history.converged, "attempts": history.attempts}
    return Outcome({**document, **dataclasses.asdict(history.checks[-1])}, [f"target: {path}"])


def decompose(
    config: Config,
    /,
    *,
    target: Path | None = None,
    seeds: int | None = None,
    out: Path | None = None,
    resume: bool = False,
    extend_steps: int | None = None,
    overwrite: bool = False,
    track: tuple[str, ...] = (),
) -> Outcome:
    """Decompose a target into a run directory.

    Args:
        config: Shipped name or YAML path, as CONFIG.
        target: Directory that holds the target. Defaults to training it first. With --seeds, {seed} in it stands for the seed.
        seeds: Number of seeds to run, as many at a time as the usable cores allow. Runs of one --target are compared.
        out: Run directory. Defaults to runs/<name>-s<seed>. With --seeds, the folder of the run directories s<seed>.
        resume: Continue the run from its last checkpoint; the result is the same, byte for byte, as without the stop.
        extend_steps: With --resume: train to this many steps; allowed if nothing so far depended on the number of steps.
        overwrite: Replace an existing run.
        track: Trackers to use besides the terminal: tensorboard, wandb, trackio.
    """
    how: dict[str, Any] = {"target": target, "resume": resume, "overwrite": overwrite}
    if seeds is not None:
        return _decompose_seeds(config, seeds, out=out, track=track, **how)
    path = out or default_out(config)
    if not resume:
        require_free(path, overwrite=overwrite)
    from paramlens.tracking.tracker import Terminal
    from paramlens.tracking.trackers import select_trackers

    run = paramlens.decompose_config(config, out=path, extend_steps=extend_steps, tracker=select_trackers(track, first=Terminal()), **how)
    return Outcome(_run_document(run), [verdict_table(run.verdicts), f"\nrun: {path}"])


def _decompose_seeds(config: Config, seeds: int, *, target: Path | None, **how: Any) -> Outcome:
    from paramlens.runs.seeds import decompose_seeds

    runs = [paramlens.open_run(path) for path in decompose_seeds(config, seeds, target=target, **how)]
    alike = target is not None and "{seed}" not in str(target) and len(runs) > 1
    found = AgreementAnalysis().compute_and_keep(*runs) if alike else None
    failed = [failures(run.verdicts) for run in runs]
    lines = [f"run: {run.path}{f' (fails: {bad})' if bad else ''}" for run, bad in zip(runs, failed, strict=True)]
    document = {"runs": [_run_document(run) for run in runs], "agreement": found.document if found else None}
    return Outcome(document, [*lines, *(found.shown if found else ())])


def _run_document(run: "paramlens.Run") -> dict[str, Any]:
    trained = [line for line in run.metrics if "losses" in line]
    losses, found = trained[-1]["losses"] if trained else {}, [dataclasses.asdict(verdict) for verdict in run.verdicts]
    return {"run": str(run.path), "steps": run.step, "seconds": run.info["seconds"], "losses": losses, "verdicts": found}


def report(run: Path | None = None, /, *, example: bool = False, budget: float = 8.0, open_: bool = False) -> Outcome:
    """Write report.html into the run directory: one offline page.

    Args:
        run: Run directory; with --example, where the shipped run goes (runs/example).
        example: Use a finished run that comes with the library, so that nothing needs to be trained.
        budget: Size in MB. A larger page leaves out the token strips of the least important subcomponents, and says so.
        open_: Open the page in the browser.
    """
    if example:
        path = paramlens.example() if run is None else paramlens.example(run)
    elif run is None:
        raise ConfigError("report: give a run directory first, then options; or --example")
    else:
        path = run_directory(run)
    page = paramlens.report(path, budget=budget)
    if open_:
        import webbrowser

        if not webbrowser.open(page.absolute().as_uri()):
            ErrorConsole().print("no browser was found here; the page is one file, so open it wherever there is one", style="yellow")
    return Outcome({"page": str(page)}, [f"page: {page}"])


def verify(run: Path, /) -> Outcome:
    """Check a run directory: checksums, shapes, metrics, and that all files belong to one run.

    Args:
        run: Run directory.
    """
    found = paramlens.verify(run_directory(run))
    return Outcome(found.to_json(), found.tables(), 0 if found.whole else 1)


def push(
    run: Path, repo: str, /, *, private: bool = False, revision: str | None = None, message: str | None = None, resumable: bool = False
) -> Outcome:
    """Upload a run directory to the Hugging Face Hub, with a card; afterwards RUN may be USER/NAME[@REVISION] too.

    Args:
        run: Run directory.
        repo: Repository, user/name; made if it is missing.
        private: Make a new repository private.
        revision: Branch, made if it is missing. Defaults to main.
        message: The commit's message. Defaults to the run's name and step.
        resumable: Include optimizer and generators, so that the run can continue elsewhere; three times the size.
    """
    require_run(run)
    commit = paramlens.push_to_hub(run, repo, private=private or None, revision=revision, message=message, resumable=resumable)
    return Outcome({"run": str(run), "repo": repo, "commit": commit}, [f"pushed: {commit}"])


def doctor(config: Config, /) -> Outcome:
    """Count parameters and estimate memory of each part of a run, before it starts."""
    from paramlens.runs.forecast import diagnose_config

    diagnosis = diagnose_config(config)
    return Outcome(diagnosis.to_json(), diagnosis.tables())


COMMANDS: dict[str, Callable[..., Outcome]] = {
    each.__name__.replace("_", "-"): each for each in (demo, train_target, decompose, report, verify, push, doctor, bench)
}
