"""Makes one offline HTML file from a run directory, without a server, network or torch."""

import json
import math
import re
import shlex
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from paramlens.config.file import load_config
from paramlens.display.figures import Figure
from paramlens.display.tables import spread
from paramlens.display.verdicts import verdicts
from paramlens.errors import ConfigError
from paramlens.files.plain import read_json, with_nan, write_text
from paramlens.page.analyses import Analyses
from paramlens.page.document import pack
from paramlens.page.training import training_figures
from paramlens.registry import ANALYSES
from paramlens.runs.layout import read_metrics, require_run

if TYPE_CHECKING:
    from paramlens.runs.rundir import Run

SCRIPTS = ("base", "map", "panel", "circuit", "plots", "main")
"""The page's own scripts, joined into one in this order."""

BUDGET = 8.0
"""Size of a page in MB; it is exceeded only if the page cannot be made smaller."""


@dataclass(frozen=True)
class _Section:
    """A section of the page for the template. text: HTML above the figures."""

    id: str
    title: str
    text: Markup
    figures: list[Figure]


def report(run: "Run | str | Path", *, budget: float = BUDGET) -> Path:
    """Write `report.html` into a run directory and return its path. Analyses that are missing or older than the run are computed.

    run: path or `Run`; for a run on your own model, the `Run` that `decompose` or `open_run` returned.
    budget: size in MB. A larger page leaves out the token strips of the least important subcomponents, and says how many.
    Raises `RunDirError` if the path is not a run, and `ConfigError` for a budget that is not above 0.
    """
    if not 0 < budget < math.inf:
        raise ConfigError(f"budget {budget}: give MB, above 0")
    path = Path(run) if isinstance(run, str | Path) else run.path
    require_run(path)
    analyses = Analyses(run, path)
    circuit, config = analyses["circuit"], load_config(path / "config.yaml")
    circuit |= {name: circuit[name] and with_nan(circuit[name]) for name in ("metrics", "off_data")}
    target = read_json(path / "target.json") if (path / "target.json").is_file() else None
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    sections = list(_sections(environment, analyses))
    sections.append(_Section("training", "Training", Markup(""), list(training_figures(read_metrics(path), target))))
    scripts = [_offline(get_plotlyjs()), _own_scripts()]
    template = environment.from_string(_shipped("report.html.j2"))
    shown = {
        "circuit": circuit,
        "info": read_json(path / "run.json"),
        "evaluated_on": circuit.get("evaluated_on", config.task.evaluated_on),
        "config": config,
        "subcomponents": spread(len(next(iter(site["subcomponents"].values()))) for site in circuit["sites"].values()),
        "inspections": analyses["inspect"]["prompts"] if config.task.own_sentences else [],
        "target": target,
        "verdicts": list(
            verdicts(circuit["metrics"], off_data=circuit["off_data"], target=target, nothing_to_attack=circuit.get("nothing_to_attack"))
        ),
        "sections": sections,
        "figures": _embedded({figure.name: _drawn(figure) for section in sections for figure in section.figures}),
        "style": Markup(_shipped("style.css")),
        "scripts": [Markup(script) for script in scripts],
        "policy": _policy(scripts),
        "budget": budget,
        "run_word": shlex.quote(str(path)),
    }
    around = len(template.render(shown, data="", packed=[""] * len(circuit["sites"]), left_out=1, parts=1, over=True).encode())
    own, place = config.task.given_in_python, json.dumps(str(path), ensure_ascii=False)
    opened = f"paramlens.open_run({place}, model=model, batches=batches)" if own else f"paramlens.open_run({place})"
    command = None if own else f"paramlens inspect {shlex.quote(str(path))}"
    room = budget * 1e6 - around
    packed = pack(opened, circuit, analyses["catalogue"], analyses["edges"], command=command, room=room)
    page = path / "report.html"
    left_out = {"left_out": packed.left_out, "parts": packed.parts, "over": packed.size > room}
    write_text(page, template.render(shown, data=_embedded(packed.document), packed=packed.sites, **left_out))
    return page


def _sections(environment: jinja2.Environment, analyses: Analyses) -> Iterator[_Section]:
    """The sections of the analyses that the run has, without empty ones."""
    for analysis in ANALYSES:
        section = analysis.section
        document = analyses.get(analysis.name) if section else None
        if section is None or document is None:
            continue
        figures, text = list(analysis.figures(document)), environment.from_string(section.template).render(document=document)
        if figures or text.strip():
            yield _Section(section.id, section.title, Markup(text), figures)


def _policy(scripts: list[str]) -> str:
    """A Content-Security-Policy that allows these scripts only, and neither loads nor sends anything over the network."""
    hashes = " ".join(f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def _drawn(figure: Figure) -> dict[str, Any]:
    """A figure in Plotly's format, with its texts escaped, and its data as a table."""
    plot: dict[str, Any] = _literal(figure.plot.to_plotly_json())
    plot["layout"].pop("template", None)
    columns, rows = figure.table()
    return {"figure": plot, "columns": columns, "rows": [[_finite(value) for value in row] for row in rows]}


def _embedded(document: Any) -> Markup:
    """JSON that is safe inside a script element: it cannot end the element."""
    return Markup(json.dumps(document, allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026"))


def _shipped(name: str) -> str:
    return (resources.files("paramlens.page") / name).read_text(encoding="utf-8")


def _own_scripts() -> str:
    return "\n".join(_shipped(f"scripts/{name}.js") for name in SCRIPTS)


def _offline(script: str) -> str:
    """Remove the scheme of every address in a script, so that the page can call none. XML namespaces stay: they are only names."""
    return re.sub(r"(?:https?|wss?)://(?!www\.w3\.org/)", "", script)


_OWN_TAGS = ("<br>", "<extra>", "</extra>")


def _literal(tree: Any) -> Any:
    """Escape, in every text of a figure, the letters that Plotly would read as a tag or an entity; our own tags stay.

    A number that is not finite becomes None, as JSON cannot hold it.
    """
    if isinstance(tree, str):
        text = tree.replace("&", "&amp;").replace("<", "&lt;")
        for tag in _OWN_TAGS:
            text = text.replace(tag.replace("<", "&lt;"), tag)
        return text
    if isinstance(tree, dict):
        return {key: _literal(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_literal(value) for value in tree]
    return _finite(tree)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
