"""From a run directory to one offline HTML file: no server, no network, no torch."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from paramlens.configfile import load_config
from paramlens.errors import RunDirError
from paramlens.layout import read_json, read_metrics, require_run, write_text
from paramlens.page.figures import attention_figure, example_figure, losses_figure, role_figure, target_figure


def report(run: str | Path) -> Path:
    """Write `report.html` into a run directory that holds `analysis/circuit.json`, and return its path.

    Raises `RunDirError` if the path is no run or the circuit has not been computed.
    """
    path = Path(getattr(run, "path", run))
    require_run(path)
    circuit_file = path / "analysis" / "circuit.json"
    if not circuit_file.is_file():
        raise RunDirError(f"{path}: no analysis/circuit.json; run paramlens circuit {path} first")
    circuit, info = read_json(circuit_file), read_json(path / "run.json")
    target = read_json(path / "target.json") if (path / "target.json").is_file() else None
    metrics = read_metrics(path)
    figures: list[tuple[str, str, go.Figure]] = [
        ("roles", "Importance by site and role: mean over positions of Σ g.", role_figure(circuit)),
        ("example", "One held-out sequence: Σ g at every site and position.", example_figure(circuit)),
        ("losses", "Losses over training, logarithmic.", losses_figure(metrics)),
    ]
    if circuit["attention_kl"]:
        figures.append(("attention", "How far attention moves in the masked model: KL in nats by query.", attention_figure(circuit)))
    if target is not None:
        figures.append(("target", "The target's training: its phase change (Figure 5).", target_figure(target)))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((resources.files("paramlens.page") / "report.html.j2").read_text(encoding="utf-8"))
    html = template.render(
        circuit=circuit,
        info=info,
        config=load_config(path / "config.yaml"),
        target=target,
        plotly=Markup(get_plotlyjs()),
        figures=[{"id": name, "caption": caption, "data": _embedded(figure)} for name, caption, figure in figures],
    )
    page = path / "report.html"
    write_text(page, html)
    return page


def _embedded(figure: go.Figure) -> Markup:
    """A figure as JSON that cannot end the script element it stands in."""
    document: dict[str, Any] = figure.to_plotly_json()
    document["layout"].pop("template", None)
    return Markup(json.dumps(document).replace("<", "\\u003c").replace("&", "\\u0026"))
