"""The commands that look at finished runs and models: circuit, svd, agreement, inspect, suppress, trace."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramlens.cli.options import Agree, Inspect, ShowCircuit, Suppress, Svd, Trace
from paramlens.display.streams import ErrorConsole
from paramlens.display.terminal import emit
from paramlens.display.verdicts import verdict_table
from paramlens.errors import ConfigError
from paramlens.runs.layout import is_run, require_run

if TYPE_CHECKING:
    from paramlens.analysis.agreement import Agreement
    from paramlens.analysis.circuit import Circuit
    from paramlens.runs.rundir import Run


def show_circuit(options: ShowCircuit, _: list[str]) -> int:
    require_run(options.run)
    result = saved_circuit(options.run, threshold=options.threshold, batches=options.batches, adversary=options.adversary)
    emit(result.to_json(), result.tables(), as_json=options.json)
    return 0


def saved_circuit(path: Path, **options: Any) -> "Circuit":
    """Table 1 of a run, kept in its `analysis/circuit.json`."""
    from paramlens.analysis.circuit import circuit
    from paramlens.runs.rundir import open_run

    run = open_run(path)
    result = circuit(run, **options)
    run.save_analysis("circuit", result.to_json())
    return result


def show_svd(options: Svd, _: list[str]) -> int:
    require_run(options.run)
    from paramlens.baselines.svd import svd_baseline
    from paramlens.runs.rundir import open_run

    run = open_run(options.run)
    result = svd_baseline(run, tolerance=options.tolerance, batches=options.batches, at_once=options.at_once)
    run.save_analysis("svd", result.to_json())
    emit(result.to_json(), result.tables(), as_json=options.json)
    return 0


def show_agreement(options: Agree, _: list[str]) -> int:
    for path in options.runs:
        require_run(path)
    from paramlens.runs.rundir import open_run

    runs = [open_run(path) for path in options.runs]
    result = saved_agreement(runs, threshold=options.threshold, batches=options.batches)
    emit(result.to_json(), result.tables(), as_json=options.json)
    return 0


def saved_agreement(runs: "Sequence[Run]", **options: Any) -> "Agreement":
    """How far runs agree, kept in the `analysis/agreement.json` of each."""
    from paramlens.analysis.agreement import agreement

    result = agreement(runs, **options)
    for run in runs:
        run.save_analysis("agreement", {"step": run.step, **result.to_json()})
    return result


def show_inspect(options: Inspect, _: list[str]) -> int:
    require_run(options.run)
    if (options.site is None) != (options.subcomponent is None):
        raise ConfigError("inspect: give --site and --subcomponent together, or neither")
    from paramlens.analysis.components import inspect_prompt, inspect_subcomponent
    from paramlens.runs.rundir import open_run

    run = open_run(options.run)
    if options.site is not None and options.subcomponent is not None:
        texts = [options.prompt] if options.prompt else _lines(options.text)
        part = inspect_subcomponent(run, options.site, options.subcomponent, texts=texts or ())
        emit(part.to_json(), part.tables(), as_json=options.json)
    else:
        found = inspect_prompt(run, options.prompt, threshold=options.threshold)
        emit(found.to_json(), found.tables(), as_json=options.json)
    return 0


def _lines(path: Path | None) -> list[str] | None:
    """The lines of a text file that hold anything."""
    if path is None:
        return None
    from paramlens.tasks.reading import read_text

    return [line.strip() for line in read_text(path, f"text {path}").split("\n") if line.strip()]


def show_suppress(options: Suppress, _: list[str]) -> int:
    require_run(options.run)
    if (options.site is None) != (not options.subcomponent):
        raise ConfigError("suppress: give --site and --subcomponent together, or neither")
    by_hand = [(options.site, c) for c in options.subcomponent if options.site is not None]
    from paramlens.analysis.controls import CONTROLS
    from paramlens.analysis.edit import suppress
    from paramlens.analysis.effect import evaluate_edit
    from paramlens.runs.rundir import open_run
    from paramlens.tasks.facts.facts import read_facts, shipped_facts

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
    stderr = ErrorConsole()
    for text in edit.warnings:
        stderr.print(f"paramlens: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    selected, verdicts = ([dataclasses.asdict(each) for each in found] for found in (edit.selected, run.verdicts))
    document: dict[str, Any] = {"selected": selected, "verdicts": verdicts, "warnings": list(edit.warnings)}
    tables = (*edit.tables(), verdict_table(run.verdicts))
    target = options.unique_to or options.fact or next(iter(run.config.task.own_sentences), None)
    if options.evaluate != "none":
        if target is None:
            raise ConfigError("suppress: give --fact, the sentence that the effect is judged by")
        result = evaluate_edit(
            run, edit, target, facts=facts, texts=_lines(options.text), controls=() if options.skip_controls else CONTROLS
        )
        document, tables = result.to_json(), result.tables()
        run.keep_analysis("suppress", "edits", document, same=("target", "method", "selected"))
    if options.save is not None:
        document["saved"] = str(edit.save(options.save))
        stderr.print(f"saved: {options.save}", highlight=False, markup=False, soft_wrap=True)
    emit(document, tables, as_json=options.json)
    return 0


def show_trace(options: Trace, _: list[str]) -> int:
    from paramlens.analysis.components import tokenizer_of
    from paramlens.analysis.trace import trace
    from paramlens.runs.rundir import open_run
    from paramlens.tasks.language_models.loading import load_language

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
    emit(result.to_json(), result.tables(zero_mlp=options.zero_mlp), as_json=options.json)
    return 0
