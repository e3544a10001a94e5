"""The command line: parse, call, print. Results go to stdout, everything else to stderr."""

import dataclasses
import difflib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from paramlens.cli.analysis_commands import (
    saved_agreement,
    saved_circuit,
    show_agreement,
    show_circuit,
    show_inspect,
    show_suppress,
    show_svd,
    show_trace,
)
from paramlens.cli.arguments import DEMO_CONFIG, configuration, parse
from paramlens.cli.completion import script
from paramlens.cli.options import (
    Agree,
    Bench,
    Completion,
    Decompose,
    Demo,
    Doctor,
    Inspect,
    Push,
    Report,
    ShowCircuit,
    Suppress,
    Svd,
    Trace,
    TrainTarget,
    Verify,
)
from paramlens.config.file import load_config, parse_value, shipped_configs
from paramlens.config.model import Config
from paramlens.display.streams import ErrorConsole, abandon, prepare_streams
from paramlens.display.terminal import emit, print_tables
from paramlens.display.verdicts import failures, verdict_table
from paramlens.errors import ConfigError, ParamLensError, RunInterrupted, Terminated
from paramlens.files.plain import json_line, read_json
from paramlens.runs.layout import RUNS, default_out, holds_toy, is_begun, is_hub_id, is_run, require_free, require_run
from paramlens.tracking.signals import termination
from paramlens.version import __version__

if TYPE_CHECKING:
    from paramlens.runs.rundir import Run

OVERVIEW = f"""paramlens {__version__} takes a Transformer's weights apart: which parts matter where

  paramlens demo               start here: the induction circuit from nothing
  paramlens decompose CONFIG   a run directory; CONFIG: shipped, or a YAML file
  paramlens circuit RUN        what is active where, and how faithful it is
  paramlens inspect RUN        what is active on which token of a sentence
  paramlens report RUN         one offline HTML page

paramlens --help lists all commands, paramlens COMMAND --help their options."""

USAGE = f"""paramlens {__version__}: take a Transformer's weights apart, see which parts matter where

  paramlens demo                      the induction circuit from nothing, with a page to look at
  paramlens train-target CONFIG       train and save a toy target
  paramlens decompose CONFIG          a run directory
  paramlens circuit RUN               what is active where, and how faithful it is (Table 1)
  paramlens inspect RUN               active subcomponents by token; what one reads and writes
  paramlens suppress RUN              take a sentence's own subcomponents out, see what every fact keeps
  paramlens trace MODEL               causal tracing: where an answer comes back
  paramlens svd RUN                   the same target pruned by SVD, at the same divergence (Algorithm 2)
  paramlens agreement RUN RUN...      do seeds find the same subcomponents
  paramlens report RUN                one offline HTML page
  paramlens verify RUN                whether all of it is as it was written
  paramlens push RUN USER/NAME        to the Hugging Face Hub; then RUN is USER/NAME[@REVISION] too
  paramlens doctor CONFIG             parameters and memory, before anything starts
  paramlens bench                     steps per second beside the same step written the obvious way
  paramlens completion SHELL          a script by which bash, zsh or fish complete all of this

CONFIG: {", ".join(shipped_configs())}, or a YAML file.
Any field of it is a flag (--optim.lr 3e-3). COMMAND --help: more."""


def entry() -> None:
    """The installed command `paramlens`."""
    prepare_streams()
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except OSError as error:  # the reader of stdout, such as head, has gone, or the disk under it is full
        if not isinstance(error, BrokenPipeError):
            ErrorConsole().print(f"paramlens: stdout: {error.strerror or error}", style="red", markup=False, highlight=False)
        abandon(sys.stdout)
        code = 1
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code: 0 done, 2 wrong input, 1 anything else, 130 or 143 after a signal."""
    console = ErrorConsole()
    with termination():
        return _command(argv, console)


def _command(argv: Sequence[str], console: Console) -> int:
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(USAGE if argv else OVERVIEW)
            return 0
        if argv[0] == "--version":
            print(__version__)
            return 0
        _require_text(argv)
        command = _COMMANDS.get(argv[0])
        if command is None:
            close = difflib.get_close_matches(argv[0], _COMMANDS, n=1)
            raise ConfigError(f"no command {argv[0]!r}{f', did you mean {close[0]}?' if close else '.'} There are: {', '.join(_COMMANDS)}")
        options, rest = parse(argv[0], command.options, argv[1:])
        if command.reads:
            _locate(options)
        return command.run(options, rest)
    except ParamLensError as error:
        console.print(f"paramlens: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        place = f"{error.filename}: " if error.filename else ""
        console.print(f"paramlens: {place}{error.strerror or error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt as stopped:
        console.print("paramlens: interrupted", style="yellow")
        return stopped.exit_code if isinstance(stopped, Terminated) else 130


def _require_text(argv: Sequence[str]) -> None:
    """Raise `ConfigError` for a word that no encoding holds, unless a file here has that name."""
    for word in argv:
        if any("\ud800" <= letter <= "\udfff" for letter in word) and not Path(word.partition("=")[2] or word).exists():
            raise ConfigError(f"{word!r}: not text in {sys.getfilesystemencoding().upper()}, as the words of a command are")


def _demo(options: Demo, _: list[str]) -> int:
    config = load_config(DEMO_CONFIG, overrides={"seed": options.seed, "name": "demo"})
    path = options.out or default_out(config)
    stderr = ErrorConsole()
    if not options.overwrite and _is_finished(path, config):
        stderr.print(f"{path} is finished already; --overwrite makes it anew", highlight=False, markup=False)
    else:
        stderr.print(f"{path}: the induction circuit from nothing, seed {options.seed}", highlight=False, markup=False, soft_wrap=True)
        from paramlens.runs.decompose import decompose_config
        from paramlens.tracking.tracker import Terminal

        resume = is_begun(path) and not options.overwrite
        overwrite = options.overwrite or (is_run(path) and not resume)  # what a demo left that was stopped before its first step
        try:
            decompose_config(config, out=path, resume=resume, overwrite=overwrite, tracker=Terminal(stderr))
        except RunInterrupted as stopped:
            place = ["--out", str(options.out)] if options.out else []
            return _interrupted(["paramlens", "demo", *(["--seed", str(options.seed)] if options.seed else []), *place], stopped)
    from paramlens.page import report
    from paramlens.runs.rundir import open_run

    found = saved_circuit(path)
    if not options.json:
        print_tables(found.tables())
    page = report(path)
    document = {**_run_document(open_run(path)), "page": str(page), "circuit": found.to_json()} if options.json else {}
    _emit(document, as_json=options.json, text=f"page: {page}")
    return 0


def _is_finished(path: Path, config: Config) -> bool:
    if not (path / "run.json").is_file():
        return False
    return read_json(path / "run.json").get("status") == "finished" and load_config(path / "config.yaml") == config


def _train_target(options: TrainTarget, rest: list[str]) -> int:
    config = configuration(options.config, rest)
    path = options.out or Path(RUNS) / f"{config.name}-target-s{config.seed}"
    require_free(path, overwrite=options.overwrite)
    from paramlens.files.lock import locked
    from paramlens.kernels.machine import machine
    from paramlens.runs import targets
    from paramlens.runs.decompose import trained_target
    from paramlens.runs.writer import RunDirectory
    from paramlens.tracking.tracker import Terminal
    from paramlens.tracking.trackers import as_tracker

    if not config.task.trained_here:
        raise ConfigError(f"{options.config}: its target is no toy; task.model, or a model of your own, is there already")
    with locked(path):
        with machine(config):
            target = trained_target(config, tracker=as_tracker(Terminal()))
        directory = RunDirectory.create(path, config, overwrite=options.overwrite)
        targets.save(config.task, target, path)
        directory.seal()
    history = target.history
    assert history is not None
    last = dataclasses.asdict(history.checks[-1])
    document = {"target": str(path), "converged": history.converged, "attempts": history.attempts, **last}
    _emit(document, as_json=options.json, text=f"target: {path}")
    return 0


def _decompose(options: Decompose, rest: list[str]) -> int:
    config = configuration(options.config, rest)
    if options.seeds is not None:
        return _decompose_seeds(options, config, rest)
    path = options.out or default_out(config)
    if not options.resume:
        require_free(path, overwrite=options.overwrite)
    from paramlens.runs.decompose import decompose_config
    from paramlens.tracking.tracker import Terminal
    from paramlens.tracking.trackers import chosen

    try:
        run = decompose_config(
            config,
            out=path,
            target=options.target,
            resume=options.resume,
            extend_steps=options.extend_steps,
            overwrite=options.overwrite,
            tracker=chosen(options.track, first=Terminal()),
        )
    except RunInterrupted as stopped:
        place = ["--out", str(options.out)] if options.out else []
        model = ["--target", str(options.target)] if options.target and not holds_toy(options.target) else []
        extended = ["--extend-steps", str(options.extend_steps)] if options.extend_steps is not None else []
        track = ["--track", *options.track] if options.track else []
        return _interrupted(["paramlens", "decompose", options.config, "--resume", *rest, *place, *model, *extended, *track], stopped)
    emit(_run_document(run), [verdict_table(run.verdicts)], as_json=options.json)
    if not options.json:
        Console().print(f"\nrun: {path}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _decompose_seeds(options: Decompose, config: Config, rest: list[str]) -> int:
    assert options.seeds is not None
    from paramlens.runs.rundir import open_run
    from paramlens.runs.seeds import decompose_seeds

    try:
        how = {name: getattr(options, name) for name in ("out", "target", "resume", "overwrite", "track")}
        paths = decompose_seeds(config, options.seeds, **how)
    except RunInterrupted as stopped:
        own = [f"--{name}={value}" for name in ("target", "seeds", "out") if (value := getattr(options, name)) is not None]
        track = ["--track", *options.track] if options.track else []
        return _interrupted(["paramlens", "decompose", options.config, "--resume", *rest, *own, *track], stopped)
    alike = options.target is not None and "{seed}" not in str(options.target) and len(paths) > 1
    found = saved_agreement([open_run(path) for path in paths]) if alike else None
    if options.json:
        runs = [_run_document(open_run(path)) for path in paths]
        print(json_line({"runs": runs, "agreement": found.to_json() if found else None}))
        return 0
    for path in paths:
        failed = failures(open_run(path).verdicts)
        text = f"run: {path}{f' (fails: {failed})' if failed else ''}"
        Console().print(text, highlight=False, markup=False, soft_wrap=True)
    if found:
        print_tables(found.tables())
    return 0


def _run_document(run: "Run") -> dict[str, Any]:
    trained = [line for line in run.metrics if "losses" in line]
    losses, found = trained[-1]["losses"] if trained else {}, [dataclasses.asdict(verdict) for verdict in run.verdicts]
    return {"run": str(run.path), "steps": run.step, "seconds": run.info["seconds"], "losses": losses, "verdicts": found}


def _interrupted(again: list[str], stopped: RunInterrupted) -> int:
    text = f"paramlens: interrupted; resume with: {shlex.join(again)}"
    ErrorConsole().print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
    return stopped.exit_code


def _report_command(options: Report, _: list[str]) -> int:
    if options.example:
        from paramlens.runs.shipped import example

        path = example() if options.run is None else example(options.run)
    elif options.run is None:
        raise ConfigError("report: give a run directory first, then options; or --example")
    else:
        require_run(path := options.run)
    from paramlens.page import report

    page = report(path, budget=options.budget)
    _emit({"page": str(page)}, as_json=options.json, text=f"page: {page}")
    if options.open:
        import webbrowser

        if not webbrowser.open(page.absolute().as_uri()):
            ErrorConsole().print("no browser was found here; the page is one file, so open it wherever there is one", style="yellow")
    return 0


def _verify(options: Verify, _: list[str]) -> int:
    require_run(options.run)
    from paramlens.runs.verification import verify

    found = verify(options.run)
    emit(found.to_json(), found.tables(), as_json=options.json)
    return 0 if found.whole else 1


def _push(options: Push, _: list[str]) -> int:
    require_run(options.run)
    from paramlens.runs.sharing import push_to_hub

    how = {name: getattr(options, name) for name in ("revision", "message", "resumable")}
    commit = push_to_hub(options.run, options.repo, private=options.private or None, **how)
    _emit({"run": str(options.run), "repo": options.repo, "commit": commit}, as_json=options.json, text=f"pushed: {commit}")
    return 0


def _locate(options: Any) -> None:
    """Put the directories of fetched runs in the place of ids on the Hub."""
    if getattr(options, "run", None) is not None:
        options.run = _located(options.run)
    if hasattr(options, "runs"):
        options.runs = tuple(_located(run) for run in options.runs)


def _located(run: Path) -> Path:
    """The run's directory, fetched from the Hub if the word is user/name or user/name@revision and no path here."""
    name, _, revision = str(run).partition("@")
    if run.exists() or not is_hub_id(name):
        return run
    from paramlens.runs.hub import fetch

    return fetch(name, revision=revision or None)


def _doctor(options: Doctor, rest: list[str]) -> int:
    config = configuration(options.config, rest)
    from paramlens.runs.forecast import foretell

    diagnosis = foretell(config)
    emit(diagnosis.to_json(), diagnosis.tables(), as_json=options.json)
    return 0


def _bench(options: Bench, _: list[str]) -> int:
    from paramlens.baselines import bench

    axes = ("importance", "length", "batch", "C", "sites", "layerwise_sites", "threads")
    fixed = {name: parse_value(str(value)) for name in axes if (value := getattr(options, name)) is not None}
    how = {name: getattr(options, name) for name in ("device", "matmul", "compile", "cuda_graph")}
    measured = []
    for each in bench.bench(
        bench.cases(options.grid, **fixed, **how),
        repeats=options.repeats,
        seconds=options.seconds,
        naive=not options.skip_naive,
        busy=not options.skip_busy,
        memory=not options.skip_memory,
    ):
        measured.append(each)
        done = f"{each.importance} length {each.length} batch {each.batch} C {each.C} sites {each.sites}: {each.steps_per_s:.2f} steps/s"
        ErrorConsole().print(done, highlight=False, markup=False)
    document = bench.document(measured)
    emit(document, [bench.bench_table(document)], as_json=options.json)
    return 0


def _completion(options: Completion, _: list[str]) -> int:
    print(script(options.shell, {name: command.options for name, command in _COMMANDS.items()}), end="")
    return 0


def _emit(document: Mapping[str, Any], *, as_json: bool, text: str) -> None:
    if as_json:
        print(json_line(document))
    else:
        Console().print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class _Command:
    options: type
    run: Callable[[Any, list[str]], int]
    reads: bool = False
    """Whether its option `run`, or each of `runs`, may also be on the Hub."""


_COMMANDS = {
    "demo": _Command(Demo, _demo),
    "train-target": _Command(TrainTarget, _train_target),
    "decompose": _Command(Decompose, _decompose),
    "circuit": _Command(ShowCircuit, show_circuit, reads=True),
    "svd": _Command(Svd, show_svd, reads=True),
    "agreement": _Command(Agree, show_agreement, reads=True),
    "inspect": _Command(Inspect, show_inspect, reads=True),
    "suppress": _Command(Suppress, show_suppress, reads=True),
    "trace": _Command(Trace, show_trace),
    "report": _Command(Report, _report_command, reads=True),
    "verify": _Command(Verify, _verify, reads=True),
    "push": _Command(Push, _push),
    "doctor": _Command(Doctor, _doctor),
    "bench": _Command(Bench, _bench),
    "completion": _Command(Completion, _completion),
}
