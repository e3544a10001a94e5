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

from paramlens import __version__
from paramlens.config import Config
from paramlens.configfile import LIST_FIELDS, SWITCHES, field_paths, load_config, parse_value, shipped_configs
from paramlens.errors import ConfigError, ParamLensError, RunInterrupted, Terminated
from paramlens.layout import default_out, holds_toy, is_begun, is_hub_id, is_run, read_json, require_free, require_run
from paramlens.options import (
    Agree,
    Bench,
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
from paramlens.signals import termination
from paramlens.terminal import (
    bench_table,
    print_agreement,
    print_circuit,
    print_diagnosis,
    print_inspection,
    print_selected,
    print_subcomponent,
    print_suppression,
    print_svd,
    print_trace,
    print_verification,
)

if TYPE_CHECKING:
    from paramlens.analysis.circuit import Circuit
    from paramlens.rundir import Run

DEMO_CONFIG = "induction-quick"

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

CONFIG: {", ".join(shipped_configs())}, or a YAML file.
Any field of it is a flag (--optim.lr 3e-3). COMMAND --help: more."""


def entry() -> None:
    """The installed command `paramlens`."""
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # the reader of stdout, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code: 0 done, 2 wrong input, 1 anything else, 130 or 143 after a signal."""
    console = Console(stderr=True)
    with termination():
        return _command(argv, console)


def _command(argv: Sequence[str], console: Console) -> int:
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
        if command.reads:
            options.run = _located(options.run)
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


def _parse(name: str, kind: type, argv: Sequence[str]) -> tuple[Any, list[str]]:
    """The command's own options, and the words that are not: overrides of configuration fields."""
    prog = f"paramlens {name}"
    first = next(iter(dataclasses.fields(kind))).name
    configured = first == "config"
    asks_help = bool({"-h", "--help"} & set(argv))
    if asks_help and configured:
        tyro.cli(_with_fields(kind, argv), prog=prog, args=["--help"], config=(tyro.conf.AvoidSubcommands,))
    if first in _FIRST and not asks_help and (not argv or argv[0].startswith("-")):
        what = f"a configuration, {', '.join(shipped_configs())} or a YAML file" if configured else _FIRST[first]
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


_FIRST = {"config": "", "run": "a run directory", "runs": "a run directory", "model": "a run directory or a model"}
"""What a command's first word is, by the name of the option."""


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

        resume = is_begun(path) and not options.overwrite
        overwrite = options.overwrite or (is_run(path) and not resume)  # what a demo left that was stopped before its first step
        try:
            decompose_config(config, out=path, resume=resume, overwrite=overwrite, tracker=Terminal(stderr))
        except RunInterrupted as stopped:
            place = ["--out", str(options.out)] if options.out else []
            return _interrupted(["paramlens", "demo", *(["--seed", str(options.seed)] if options.seed else []), *place], stopped)
    from paramlens.page import report

    print_circuit(_circuit(path), Console())
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
    require_free(path, overwrite=options.overwrite)
    from paramlens import targets
    from paramlens.lock import locked
    from paramlens.machine import machine
    from paramlens.rundir import RunDirectory
    from paramlens.runs import trained_target
    from paramlens.tracking import Terminal

    if not targets.is_trained_here(config):
        raise ConfigError(f"{options.config}: its target is no toy; task.model, or a model of your own, is there already")
    with locked(path):
        with machine(config):
            target = trained_target(config, tracker=Terminal())
        directory = RunDirectory.create(path, config, overwrite=options.overwrite)
        targets.save(target, path)
        directory.seal()
    history = target.history
    assert history is not None
    last = dataclasses.asdict(history.checks[-1])
    document = {"target": str(path), "converged": history.converged, "attempts": history.attempts, **last}
    _emit(document, as_json=options.json, text=f"target: {path}")
    return 0


def _decompose(options: Decompose, rest: list[str]) -> int:
    config = _configuration(options.config, rest)
    if options.seeds is not None:
        return _decompose_seeds(options, config, rest)
    path = options.out or default_out(config)
    if not options.resume:
        require_free(path, overwrite=options.overwrite)
    from paramlens.runs import decompose_config
    from paramlens.trackers import chosen
    from paramlens.tracking import Terminal

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
    _emit(_run_document(run), as_json=options.json, text=f"run: {path}")
    return 0


def _decompose_seeds(options: Decompose, config: Config, rest: list[str]) -> int:
    assert options.seeds is not None
    from paramlens.analysis.agreement import agreement
    from paramlens.rundir import open_run
    from paramlens.seeds import decompose_seeds

    try:
        how = {name: getattr(options, name) for name in ("out", "target", "resume", "overwrite", "track")}
        paths = decompose_seeds(config, options.seeds, **how)
    except RunInterrupted as stopped:
        own = [f"--{name}={value}" for name in ("target", "seeds", "out") if (value := getattr(options, name)) is not None]
        track = ["--track", *options.track] if options.track else []
        return _interrupted(["paramlens", "decompose", options.config, "--resume", *rest, *own, *track], stopped)
    alike = options.target is not None and "{seed}" not in str(options.target) and len(paths) > 1
    found = agreement([open_run(path) for path in paths]) if alike else None
    if options.json:
        runs = [_run_document(open_run(path)) for path in paths]
        print(json.dumps({"runs": runs, "agreement": found.to_json() if found else None}))
        return 0
    for path in paths:
        Console().print(f"run: {path}", highlight=False, markup=False, soft_wrap=True)
    if found:
        print_agreement(found, Console())
    return 0


def _run_document(run: "Run") -> dict[str, Any]:
    trained = [line for line in run.metrics if "losses" in line]
    return {"run": str(run.path), "steps": run.step, "seconds": run.info["seconds"], "losses": trained[-1]["losses"] if trained else {}}


def _interrupted(again: list[str], stopped: RunInterrupted) -> int:
    text = f"paramlens: interrupted; resume with: {shlex.join(again)}"
    Console(stderr=True).print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
    return stopped.exit_code


def _circuit_command(options: ShowCircuit, _: list[str]) -> int:
    require_run(options.run)
    result = _circuit(options.run, threshold=options.threshold, batches=options.batches, adversary=options.adversary)
    if options.json:
        print(json.dumps(result.to_json()))
    else:
        print_circuit(result, Console())
    return 0


def _circuit(path: Path, **options: Any) -> "Circuit":
    from paramlens.analysis.circuit import circuit
    from paramlens.rundir import open_run

    run = open_run(path)
    result = circuit(run, **options)
    run.save_analysis("circuit", result.to_json())
    return result


def _svd(options: Svd, _: list[str]) -> int:
    require_run(options.run)
    from paramlens.analysis.svd import svd_baseline
    from paramlens.rundir import open_run

    run = open_run(options.run)
    result = svd_baseline(run, tolerance=options.tolerance, batches=options.batches, at_once=options.at_once)
    run.save_analysis("svd", result.to_json())
    if options.json:
        print(json.dumps(result.to_json()))
    else:
        print_svd(result, Console())
    return 0


def _agreement(options: Agree, _: list[str]) -> int:
    for path in options.runs:
        require_run(path)
    from paramlens.analysis.agreement import agreement
    from paramlens.rundir import open_run

    result = agreement([open_run(path) for path in options.runs], threshold=options.threshold, batches=options.batches)
    if options.json:
        print(json.dumps(result.to_json()))
    else:
        print_agreement(result, Console())
    return 0


def _inspect(options: Inspect, _: list[str]) -> int:
    require_run(options.run)
    if (options.site is None) != (options.subcomponent is None):
        raise ConfigError("inspect: give --site and --subcomponent together, or neither")
    from paramlens.analysis.components import inspect_prompt, inspect_subcomponent
    from paramlens.rundir import open_run

    run = open_run(options.run)
    if options.site is not None and options.subcomponent is not None:
        texts = [options.prompt] if options.prompt else _lines(options.text)
        part = inspect_subcomponent(run, options.site, options.subcomponent, texts=texts or ())
        print(json.dumps(part.to_json())) if options.json else print_subcomponent(part, Console())
    else:
        found = inspect_prompt(run, options.prompt, threshold=options.threshold)
        print(json.dumps(found.to_json())) if options.json else print_inspection(found, Console())
    return 0


def _lines(path: Path | None) -> list[str] | None:
    """The lines of a text file that hold anything."""
    if path is None:
        return None
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text {path}: cannot be read ({error}); give a text file in UTF-8") from None


def _suppress(options: Suppress, _: list[str]) -> int:
    require_run(options.run)
    if (options.site is None) != (not options.subcomponent):
        raise ConfigError("suppress: give --site and --subcomponent together, or neither")
    by_hand = [(options.site, c) for c in options.subcomponent if options.site is not None]
    from paramlens.analysis.components import own_sentences
    from paramlens.analysis.edit import suppress
    from paramlens.analysis.effect import CONTROLS, evaluate_edit
    from paramlens.rundir import open_run
    from paramlens.tasks.facts import read_facts, shipped_facts

    facts = shipped_facts() if options.evaluate in ("shipped", "none") else read_facts(Path(options.evaluate))
    run = open_run(options.run)
    edit = suppress(
        run,
        unique_to=options.unique_to,
        top=options.top,
        tokens=options.tokens,
        per_token=options.per_token,
        sites=options.sites,
        subcomponents=by_hand or None,
        method=options.method,
        threshold=options.threshold,
        facts=facts,
    )
    document: dict[str, Any] = {"selected": [dataclasses.asdict(each) for each in edit.selected]}
    target = options.unique_to or options.fact or next(iter(own_sentences(run)), None)
    if options.evaluate != "none":
        if target is None:
            raise ConfigError("suppress: give --fact, the sentence that the effect is judged by")
        result = evaluate_edit(
            run, edit, target, facts=facts, texts=_lines(options.text), controls=() if options.skip_controls else CONTROLS
        )
        document = result.to_json()
        run.keep_analysis("suppress", "edits", document, same=("target", "method", "selected"))
        if not options.json:
            print_suppression(result, Console())
    elif not options.json:
        print_selected(edit.selected, Console())
    if options.save is not None:
        document["saved"] = str(edit.save(options.save))
        Console(stderr=True).print(f"saved: {options.save}", highlight=False, markup=False, soft_wrap=True)
    if options.json:
        print(json.dumps(document))
    return 0


def _trace(options: Trace, _: list[str]) -> int:
    from paramlens.analysis.components import tokenizer_of
    from paramlens.analysis.trace import trace
    from paramlens.rundir import open_run
    from paramlens.tasks.language import load_language

    path = Path(options.model)
    run = open_run(path) if is_run(path) else None
    if run is None:
        language = load_language(str(path / "target") if (path / "target" / "config.json").is_file() else options.model)
        model, tokenizer = language.model, language.tokenizer
    else:
        model, tokenizer = run.decomposition.model, tokenizer_of(run)
    how = {name: getattr(options, name) for name in ("answer", "noise", "samples", "window", "seed")}
    result = trace(model, tokenizer, options.prompt, options.subject, name=options.model, **how)
    if run is not None:
        run.keep_analysis("trace", "traces", result.to_json(), same=("prompt", "subject", "answer"))
    if options.json:
        print(json.dumps(result.to_json()))
    else:
        print_trace(result, Console(), zero_mlp=options.zero_mlp)
    return 0


def _report_command(options: Report, _: list[str]) -> int:
    require_run(options.run)
    from paramlens.page import report

    page = report(options.run)
    Console().print(f"page: {page}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _verify(options: Verify, _: list[str]) -> int:
    require_run(options.run)
    from paramlens.verification import verify

    found = verify(options.run)
    if options.json:
        print(json.dumps(found.to_json()))
    else:
        print_verification(found, Console())
    return 0 if found.whole else 1


def _push(options: Push, _: list[str]) -> int:
    require_run(options.run)
    from paramlens.sharing import push_to_hub

    how = {name: getattr(options, name) for name in ("revision", "message", "resumable")}
    commit = push_to_hub(options.run, options.repo, private=options.private or None, **how)
    _emit({"run": str(options.run), "repo": options.repo, "commit": commit}, as_json=options.json, text=f"pushed: {commit}")
    return 0


def _located(run: Path) -> Path:
    """The run's directory, fetched from the Hub if the word is user/name or user/name@revision and no path here."""
    name, _, revision = str(run).partition("@")
    if run.exists() or not is_hub_id(name):
        return run
    from paramlens.hub import fetch

    return fetch(name, revision=revision or None)


def _doctor(options: Doctor, rest: list[str]) -> int:
    config = _configuration(options.config, rest)
    from paramlens.budget import diagnose
    from paramlens.sites import find_sites
    from paramlens.targets import skeleton

    model, length, vocabulary = skeleton(config)
    diagnosis = diagnose(config, find_sites(model, config.sites), length=length, vocabulary=vocabulary)
    if options.json:
        print(json.dumps(diagnosis.to_json()))
    else:
        print_diagnosis(diagnosis, Console())
    return 0


def _bench(options: Bench, _: list[str]) -> int:
    from paramlens import bench

    axes = ("importance", "length", "batch", "C", "sites", "layerwise_sites", "threads")
    fixed = {name: parse_value(str(value)) for name in axes if (value := getattr(options, name)) is not None}
    how = {name: getattr(options, name) for name in ("device", "matmul", "compile", "cuda_graph")}
    measured = []
    for each in bench.bench(
        bench.cases(options.grid, **fixed, **how),
        repeats=options.repeats,
        seconds=options.seconds,
        naive=not options.skip_naive,
        memory=not options.skip_memory,
    ):
        measured.append(each)
        done = f"{each.importance} length {each.length} batch {each.batch} C {each.C} sites {each.sites}: {each.steps_per_s:.2f} steps/s"
        Console(stderr=True).print(done, highlight=False, markup=False)
    document = bench.document(measured)
    if options.json:
        print(json.dumps(document))
    else:
        Console().print(bench_table(document))
    return 0


def _emit(document: Mapping[str, Any], *, as_json: bool, text: str) -> None:
    if as_json:
        print(json.dumps(document))
    else:
        Console().print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class _Command:
    options: type
    run: Callable[[Any, list[str]], int]
    reads: bool = False
    """Whether its option `run` may also be on the Hub."""


_COMMANDS = {
    "demo": _Command(Demo, _demo),
    "train-target": _Command(TrainTarget, _train_target),
    "decompose": _Command(Decompose, _decompose),
    "circuit": _Command(ShowCircuit, _circuit_command, reads=True),
    "svd": _Command(Svd, _svd, reads=True),
    "agreement": _Command(Agree, _agreement),
    "inspect": _Command(Inspect, _inspect, reads=True),
    "suppress": _Command(Suppress, _suppress, reads=True),
    "trace": _Command(Trace, _trace),
    "report": _Command(Report, _report_command, reads=True),
    "verify": _Command(Verify, _verify, reads=True),
    "push": _Command(Push, _push),
    "doctor": _Command(Doctor, _doctor),
    "bench": _Command(Bench, _bench),
}
