"""The command line: parse, call, print. Results go to stdout, everything else to stderr."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from paramlens import __version__
from paramlens.config import Config, InductionTask
from paramlens.configfile import LIST_FIELDS, SWITCHES, field_paths, load_config, parse_value, shipped_configs
from paramlens.errors import ConfigError, ParamLensError, RunInterrupted
from paramlens.layout import checkpoints, default_out, is_run, read_json, require_free, require_run

if TYPE_CHECKING:
    from paramlens.analysis.circuit import Circuit
    from paramlens.analysis.doctor import Diagnosis

DEMO_CONFIG = "induction-quick"

USAGE = f"""paramlens {__version__}: take a Transformer's weights apart, see which parts matter where

  paramlens demo                      the induction circuit from nothing, with a page to look at
  paramlens train-target CONFIG       train and save a toy target
  paramlens decompose CONFIG          a run directory
  paramlens circuit RUN               what is active where, and how faithful it is (Table 1)
  paramlens report RUN                one offline HTML page
  paramlens doctor CONFIG             parameters and memory, before anything starts

CONFIG: {", ".join(shipped_configs())}, or a YAML file; any field is a flag (--optim.lr 3e-3). COMMAND --help says more."""


@dataclass
class Demo:
    """Train the induction target, decompose it, print Table 1 and write report.html."""

    seed: int = 0
    """Seeds target and decomposition."""
    out: Path | None = None
    """Run directory (runs/demo-s<seed>)."""
    overwrite: bool = False
    """Replace an existing run."""


@dataclass
class TrainTarget:
    """Train a toy target and save it."""

    config: Positional[str]
    """Shipped name or YAML path."""
    out: Path | None = None
    """Directory for it (runs/<name>-target-s<seed>)."""
    overwrite: bool = False
    """Replace an existing target."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class Decompose:
    """Decompose a target into a run directory."""

    config: Positional[str]
    """Shipped name or YAML path."""
    target: Path | None = None
    """Directory that holds the target; none: train it first."""
    out: Path | None = None
    """Run directory (runs/<name>-s<seed>)."""
    resume: bool = False
    """Continue the run at its last checkpoint."""
    overwrite: bool = False
    """Replace an existing run."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class Doctor:
    """Count parameters and memory by part."""

    config: Positional[str]
    """Shipped name or YAML path."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class ShowCircuit:
    """Table 1: active subcomponents by role, unique counts, metrics."""

    run: Positional[Path]
    """Run directory."""
    threshold: float = 0.1
    """A subcomponent is active where its importance exceeds this, in [0, 1)."""
    batches: int = 16
    """Held-out batches evaluated."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class Report:
    """Write report.html into the run directory."""

    run: Positional[Path]
    """Run directory."""


def entry() -> None:
    """The installed command `paramlens`."""
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # the reader of stdout, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code: 0 done, 2 wrong input, 1 anything else, 130 interrupted."""
    console = Console(stderr=True)
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(USAGE)
            return 0
        if argv[0] == "--version":
            print(__version__)
            return 0
        command = _COMMANDS.get(argv[0])
        if command is None:
            close = difflib.get_close_matches(argv[0], _COMMANDS, n=1)
            raise ConfigError(f"no command {argv[0]!r}{f', did you mean {close[0]}?' if close else '.'} There are: {', '.join(_COMMANDS)}")
        options, rest = _parse(argv[0], command.options, argv[1:])
        return command.run(options, rest)
    except ParamLensError as error:
        console.print(f"paramlens: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        console.print("paramlens: interrupted", style="yellow")
        return 130


def _parse(name: str, kind: type, argv: Sequence[str]) -> tuple[Any, list[str]]:
    """The command's own options, and the words that are not: overrides of configuration fields."""
    prog = f"paramlens {name}"
    first = next(iter(dataclasses.fields(kind))).name
    configured = first == "config"
    asks_help = bool({"-h", "--help"} & set(argv))
    if asks_help and configured:
        tyro.cli(_with_fields(kind, argv), prog=prog, args=["--help"], config=(tyro.conf.AvoidSubcommands,))
    if first in ("config", "run") and not asks_help and (not argv or argv[0].startswith("-")):
        what = f"a configuration, {', '.join(shipped_configs())} or a YAML file" if configured else "a run directory"
        raise ConfigError(f"{name}: give {what} first, then options")
    if asks_help:
        tyro.cli(kind, prog=prog, args=["--help"], config=(tyro.conf.FlagCreatePairsOff,))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            options, rest = tyro.cli(kind, prog=prog, args=argv, return_unknown_args=True, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit:
        raise ConfigError(f"{name}: {_first_paragraph(complaint.getvalue())}") from None
    own = [option.name for option in dataclasses.fields(kind)]
    for word in rest:
        flag = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and not (configured and flag in field_paths()):
            close = difflib.get_close_matches(flag, own, n=1, cutoff=0.75)
            if close or not configured:
                raise ConfigError(f"{name}: unknown option {word}{f'; did you mean --{close[0]}?' if close else ''}")
    if rest and not configured:
        raise ConfigError(f"{name}: unexpected argument {rest[0]!r}")
    return options, rest


def _first_paragraph(boxed: str) -> str:
    """What a complaint of tyro's says first, without the box drawn around it: a title, a rule or not, then the text up to a rule."""
    frame = " │╭╮╰╯─-"
    body = itertools.dropwhile(lambda line: not line.strip(frame), boxed.splitlines()[1:])
    return " ".join(line.strip(" │") for line in itertools.takewhile(lambda line: line.strip(frame), body))


def _with_fields(kind: type, argv: Sequence[str]) -> type:
    """The command's options and every configuration field as a flag: what --help shows."""
    names = [word for word in argv if not word.startswith("-")]
    loaded = load_config(names[0] if names else DEMO_CONFIG)
    overrides = tyro.conf.FlagConversionOff[Annotated[Config, tyro.conf.arg(name="")]]
    shown = dataclasses.make_dataclass(kind.__name__, [("overrides", overrides, field(default=loaded))], bases=(kind,), kw_only=True)
    shown.__doc__ = kind.__doc__
    return shown


def _configuration(name: str, words: list[str]) -> Config:
    """The configuration `name` with flags on top: `--field value`, `--field=value`, several values for a list, none for true."""
    overrides: dict[str, Any] = {}
    while words:
        flag, has_inline, inline = words[0].partition("=")
        if not flag.startswith("--"):
            raise ConfigError(f"unexpected argument {words[0]!r}; fields are flags, such as --optim.lr 3e-3")
        end = next((i for i, word in enumerate(words[1:], 1) if word.startswith("--")), len(words))
        values = [inline, *words[1:end]] if has_inline else words[1:end]
        path = flag.removeprefix("--").replace("-", "_")
        parsed = [parse_value(value) for value in values]
        if not parsed and path not in SWITCHES:
            raise ConfigError(f"{flag}: give a value")
        if len(parsed) > 1 and path not in LIST_FIELDS:
            raise ConfigError(f"{flag}: one value is needed, not {' '.join(values)}")
        listed = path in LIST_FIELDS and not (len(parsed) == 1 and isinstance(parsed[0], list))
        overrides[path] = parsed if listed else parsed[0] if parsed else True
        words = words[end:]
    return load_config(name, overrides=overrides)


def _demo(options: Demo, _: list[str]) -> int:
    config = load_config(DEMO_CONFIG, overrides={"seed": options.seed, "name": "demo"})
    path = options.out or default_out(config)
    stderr = Console(stderr=True)
    if not options.overwrite and _is_finished(path, config):
        stderr.print(f"{path} is finished already; --overwrite makes it anew", highlight=False, markup=False)
    else:
        from paramlens.runs import decompose_config
        from paramlens.tracking import Terminal

        resume = not options.overwrite and bool(checkpoints(path))
        overwrite = options.overwrite or (is_run(path) and not resume)  # what an interrupted demo left before its first checkpoint
        try:
            decompose_config(config, out=path, resume=resume, overwrite=overwrite, tracker=Terminal(stderr))
        except RunInterrupted:
            place = ["--out", str(options.out)] if options.out else []
            return _interrupted(["paramlens", "demo", *(["--seed", str(options.seed)] if options.seed else []), *place])
    from paramlens.page import report

    _print_circuit(_circuit(path), Console())
    page = report(path)
    Console().print(f"page: {page}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _is_finished(path: Path, config: Config) -> bool:
    if not (path / "run.json").is_file():
        return False
    return read_json(path / "run.json").get("status") == "finished" and load_config(path / "config.yaml") == config


def _train_target(options: TrainTarget, rest: list[str]) -> int:
    config = _configuration(options.config, rest)
    path = options.out or Path("runs") / f"{config.name}-target-s{config.seed}"
    if not isinstance(config.task, InductionTask):
        raise ConfigError(f"{options.config}: task.kind {config.task.kind} has no toy target to train")
    require_free(path, overwrite=options.overwrite)
    from paramlens.machine import machine
    from paramlens.rundir import RunDirectory
    from paramlens.runs import trained_target
    from paramlens.tracking import Terminal

    with machine(config):
        model, history = trained_target(config, tracker=Terminal())
    directory = RunDirectory.create(path, config, overwrite=options.overwrite)
    directory.save_target(model, history)
    last = history.checks[-1]
    document = {"target": str(path), "converged": history.converged, "attempts": history.attempts, **dataclasses.asdict(last)}
    _emit(document, as_json=options.json, text=f"target: {path}")
    return 0


def _decompose(options: Decompose, rest: list[str]) -> int:
    config = _configuration(options.config, rest)
    path = options.out or default_out(config)
    if not options.resume:
        require_free(path, overwrite=options.overwrite)
    from paramlens.runs import decompose_config
    from paramlens.tracking import Terminal

    try:
        run = decompose_config(
            config, out=path, target=options.target, resume=options.resume, overwrite=options.overwrite, tracker=Terminal()
        )
    except RunInterrupted:
        place = ["--out", str(options.out)] if options.out else []
        return _interrupted(["paramlens", "decompose", options.config, "--resume", *rest, *place])
    trained = [line for line in run.metrics if "losses" in line]
    document = {"run": str(path), "steps": run.step, "seconds": run.info["seconds"], "losses": trained[-1]["losses"] if trained else {}}
    _emit(document, as_json=options.json, text=f"run: {path}")
    return 0


def _interrupted(again: list[str]) -> int:
    text = f"paramlens: interrupted; resume with: {shlex.join(again)}"
    Console(stderr=True).print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
    return 130


def _circuit_command(options: ShowCircuit, _: list[str]) -> int:
    require_run(options.run)
    result = _circuit(options.run, threshold=options.threshold, batches=options.batches)
    if options.json:
        print(json.dumps(result.to_json()))
    else:
        _print_circuit(result, Console())
    return 0


def _circuit(path: Path, *, threshold: float = 0.1, batches: int = 16) -> "Circuit":
    from paramlens.analysis.circuit import circuit
    from paramlens.rundir import open_run

    run = open_run(path)
    result = circuit(run, threshold=threshold, batches=batches)
    run.save_analysis("circuit", result.to_json())
    return result


def _print_circuit(result: "Circuit", console: Console) -> None:
    """Tables 1a and 1b as one table, 1c under it, and a word on silent sites."""
    table = Table(title=f"Active subcomponents (importance > {result.threshold:g}), {result.sequences} sequences", title_justify="left")
    table.add_column("site")
    for role in result.roles:
        table.add_column(role, justify="right")
    table.add_column("unique", justify="right")
    for name, site in result.sites.items():
        cells = [f"{site.active[role]:.3f}" for role in result.roles]
        table.add_row(name, *[cell if float(cell) >= 0.5 else f"[dim]{cell}[/dim]" for cell in cells], str(site.unique))
    console.print(table)
    metrics = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in result.metrics.items():
        metrics.add_row(name, f"{value:.4f}" if name.startswith("accuracy") else f"{value:.2e}")
    console.print(metrics)
    for name, site in result.sites.items():
        if site.silent:
            console.print(f"{name} is silent: it {site.silent}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _report_command(options: Report, _: list[str]) -> int:
    require_run(options.run)
    from paramlens.page import report

    page = report(options.run)
    Console().print(f"page: {page}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _doctor(options: Doctor, rest: list[str]) -> int:
    config = _configuration(options.config, rest)
    if not isinstance(config.task, InductionTask):
        raise ConfigError(f"{options.config}: task.kind {config.task.kind} has a model of your own; doctor needs one it can build")
    from paramlens.analysis.doctor import diagnose
    from paramlens.sites import find_sites
    from paramlens.tasks.induction import InductionTransformer

    sites = find_sites(InductionTransformer(config.task), config.sites)
    diagnosis = diagnose(config, sites, length=config.task.length, vocabulary=config.task.vocabulary + 1)
    if options.json:
        print(json.dumps(diagnosis.to_json()))
    else:
        _print_diagnosis(diagnosis, Console())
    return 0


def _print_diagnosis(diagnosis: "Diagnosis", console: Console) -> None:
    for title, parts, unit in (("parameters", diagnosis.parameters, 1), ("memory, MiB", diagnosis.bytes, 2**20)):
        table = Table(title=f"{title} ({diagnosis.sites} sites)", title_justify="left", show_header=False)
        for name, count in parts.items():
            table.add_row(name, f"{count:,}" if unit == 1 else f"{count / unit:,.1f}")
        console.print(table)


def _emit(document: Mapping[str, Any], *, as_json: bool, text: str) -> None:
    if as_json:
        print(json.dumps(document))
    else:
        Console().print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class _Command:
    options: type
    run: Callable[[Any, list[str]], int]


_COMMANDS = {
    "demo": _Command(Demo, _demo),
    "train-target": _Command(TrainTarget, _train_target),
    "decompose": _Command(Decompose, _decompose),
    "circuit": _Command(ShowCircuit, _circuit_command),
    "report": _Command(Report, _report_command),
    "doctor": _Command(Doctor, _doctor),
}
