"""From a run directory to one offline HTML file: no server, no network, no torch."""

import json
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from paramlens.config import Config, FactsTask
from paramlens.configfile import load_config
from paramlens.layout import checkpoint_step, find_checkpoint, read_json, read_metrics, require_run, write_text
from paramlens.page.figures import (
    attention_figure,
    example_figure,
    losses_figure,
    maps_figure,
    patterns_figure,
    role_attention_figure,
    role_figure,
    suppression_figure,
    svd_figure,
    target_figure,
    trace_figure,
    zero_figure,
)

if TYPE_CHECKING:
    from paramlens.rundir import Run


_READ = {"sites", "metrics", "attention_kl", "attention_by_role", "interventions", "maps", "example"}
"""What the page reads of a circuit; one written by an earlier version has less, and is computed again."""


def report(run: "Run | str | Path") -> Path:
    """Write `report.html` into a run directory and return its path; the circuit is computed where it is missing or older than the run.

    Raises `RunDirError` if the path is no run. A run on your own model is given as the `Run` that `decompose` or `open_run` returned.
    """
    path = Path(run) if isinstance(run, str | Path) else run.path
    require_run(path)
    circuit, info = _circuit(run, path), read_json(path / "run.json")
    config = load_config(path / "config.yaml")
    inspections = _inspections(run, path, config)
    target = read_json(path / "target.json") if (path / "target.json").is_file() else None
    analyses = {name: _current(path / "analysis" / f"{name}.json", path) for name in ("svd", "suppress", "trace")}
    figures = list(_figures(circuit, read_metrics(path), target, analyses))
    scripts = [get_plotlyjs(), (resources.files("paramlens.page") / "report.js").read_text(encoding="utf-8")]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((resources.files("paramlens.page") / "report.html.j2").read_text(encoding="utf-8"))
    html = template.render(
        circuit=circuit,
        info=info,
        config=config,
        inspections=inspections,
        edits=(analyses["suppress"] or {"edits": []})["edits"],
        target=target,
        figures=[{"id": name, "caption": caption} for name, caption, _ in figures],
        data=_embedded({name: figure for name, _, figure in figures}),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
    )
    page = path / "report.html"
    write_text(page, html)
    return page


def _figures(
    circuit: dict[str, Any], metrics: list[dict[str, Any]], target: dict[str, Any] | None, analyses: dict[str, dict[str, Any] | None]
) -> Iterator[tuple[str, str, go.Figure]]:
    """Name, caption and figure of all that there are data for."""
    yield "roles", "Importance by site and role: mean over positions of Σ g.", role_figure(circuit)
    if circuit["maps"]:
        yield "maps", "Importance around each role: mean over sequences of Σ g.", maps_figure(circuit)
    yield "example", "One held-out sequence: Σ g at every site and position.", example_figure(circuit)
    if circuit["example"]["attention"]:
        yield "patterns", "Attention in that sequence: the target's, and the masked model's.", patterns_figure(circuit)
    if circuit["attention_by_role"]:
        caption = "Attention from a role (rows) to a role (columns): the target's, and the masked model's."
        yield "roleattention", caption, role_attention_figure(circuit)
    if circuit["attention_kl"]:
        yield "attention", "How far attention moves in the masked model: KL in nats by query.", attention_figure(circuit)
    for i, edit in enumerate((analyses["suppress"] or {"edits": []})["edits"]):
        caption = f"Suppressed for “{edit['target']}” ({edit['method']}): what every kind of fact keeps (Figures 3, 4)."
        yield f"suppress-{i}", caption, suppression_figure(edit)
    traces = (analyses["trace"] or {"traces": []})["traces"]
    for i, trace in enumerate(traces):
        text = f"{trace['prompt']} {trace['answer']}"
        yield (
            f"trace-{i}",
            f"Causal tracing of “{text}”: where restoring a state brings the answer back (Figures 7, 8).",
            trace_figure(trace),
        )
    if traces:
        yield "zero", "One whole MLP put to zero (Figure 9).", zero_figure(traces)
    if (svd := analyses["svd"]) is not None:
        caption = "What is lost with how many rank-1 parts: SVD pruned greedily (Algorithm 2), and the decomposition (Figure 2)."
        yield "svd", caption, svd_figure(svd)
    yield "losses", "Losses over training, logarithmic.", losses_figure(metrics)
    if target is not None:
        yield "target", "The target's training: its phase change (Figure 5).", target_figure(target)


def _circuit(run: "Run | str | Path", path: Path) -> dict[str, Any]:
    file = path / "analysis" / "circuit.json"
    document = _current(file, path)
    if document is None or not document.keys() >= _READ:
        from paramlens.analysis.circuit import circuit
        from paramlens.rundir import open_run

        opened = open_run(run) if isinstance(run, str | Path) else run
        opened.save_analysis("circuit", circuit(opened).to_json())
    return read_json(file)


def _inspections(run: "Run | str | Path", path: Path, config: Config) -> list[dict[str, Any]]:
    """What is active in each of a facts run's sentences; computed where it is missing or older than the run."""
    if not isinstance(config.task, FactsTask):
        return []
    file = path / "analysis" / "inspect.json"
    document = _current(file, path)
    if document is None or {each["prompt"] for each in document["prompts"]} != set(config.task.sentences):
        from paramlens.analysis.components import inspect_prompt
        from paramlens.rundir import open_run

        opened = open_run(run) if isinstance(run, str | Path) else run
        prompts = [inspect_prompt(opened, sentence).to_json() for sentence in config.task.sentences]
        opened.save_analysis("inspect", {"step": opened.step, "prompts": prompts})
    return read_json(file)["prompts"]


def _current(file: Path, path: Path) -> dict[str, Any] | None:
    """An analysis in the run directory; none if it is missing or of an older checkpoint."""
    document = read_json(file) if file.is_file() else None
    return document if document and document["step"] == checkpoint_step(find_checkpoint(path, None)) else None


def _policy(scripts: list[str]) -> str:
    """A Content-Security-Policy: these scripts and no others, nothing from anywhere, nothing sent anywhere."""
    hashes = " ".join(f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def _embedded(figures: dict[str, go.Figure]) -> Markup:
    """Figures as JSON that cannot end the script element it stands in, their texts as Plotly shows them letter by letter."""
    documents: dict[str, Any] = {name: _literal(figure.to_plotly_json()) for name, figure in figures.items()}
    for document in documents.values():
        document["layout"].pop("template", None)
    return Markup(json.dumps(documents).replace("<", "\\u003c").replace("&", "\\u0026"))


_OWN_TAGS = ("<br>", "<extra>", "</extra>")


def _literal(tree: Any) -> Any:
    """Every text of a figure with the letters that Plotly would read as a tag or an entity escaped, our own tags apart."""
    if isinstance(tree, str):
        text = tree.replace("&", "&amp;").replace("<", "&lt;")
        for tag in _OWN_TAGS:
            text = text.replace(tag.replace("<", "&lt;"), tag)
        return text
    if isinstance(tree, dict):
        return {key: _literal(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_literal(value) for value in tree]
    return tree
