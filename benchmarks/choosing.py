"""What docs/choosing.md shows: the paper's own losses on the induction head in 600 steps, one knob turned at a time, on one target.

    python benchmarks/choosing.py runs       what is not there yet; docs/results/choosing.json, about half an hour of one core
    python benchmarks/choosing.py tables     Markdown and the pictures of what is there

The target is trained first (`paramlens train-target induction-quick`), and every run is `paramlens decompose induction-quick --target ...`
with the fields of `paper_form.PAPER_FORM`, 600 steps, and the fields named.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from paper_form import PAPER_FORM
from picture import save_figure
from plotly.subplots import make_subplots
from studies import HOME, SHORT

from paramlens import circuit, decompose_config, load_config, open_run
from paramlens.baselines.bench import _processor
from paramlens.errors import ParamLensError

CONFIG = "induction-quick"
SHORTER = {"steps": 600, "checkpoint.every": 600, "evaluate.every": 600}
GAMMA = {"attention": (4, 16), "vector": (8, 16), "scalar": (8, 16), "shared": (8, 64)}
RUNS: dict[str, dict[str, dict[str, object]]] = {
    "shipped": {"shipped": {}},
    "C": {str(C): {"C": C} for C in (8, 16, 48, 96)},
    "minimality": {str(value): {"losses.minimality": value} for value in (0.02, 0.06, 0.6, 2.0)},
    "γ": {f"{kind} {d}": {"gamma.kind": kind, "gamma.d_gate": d} for kind, widths in GAMMA.items() for d in widths},
    "init": {
        "svd_rotated": {"init.kind": "svd_rotated"},
        "random": {"init.kind": "random"},
        "random, 500 steps of warm-up": {"init.kind": "random", "init.warmup_steps": 500},
    },
    "faithfulness": {f"{value:g}": {"losses.faithfulness": value} for value in (0.0, 1.0, 100.0, 10_000.0)},
    "reconstruction": {
        "masks g: a tenth": {"losses.recon": 0.05, "losses.recon_layerwise": 0.05},
        "stochastic masks: a tenth": {"losses.stochastic_recon": 0.1, "losses.stochastic_recon_layerwise": 0.1},
    },
}
"""Knob → its setting → the fields that differ from `PAPER_FORM`."""
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "choosing.json"
IMAGES = ROOT / "docs" / "images"
FOLDER = ROOT / "runs" / "choosing"
COLOURS = ("#1a6f78", "#b4500f", "#6b3fa0", "#5c6672", "#8f8f3d", "#a05cb8")
Row = Mapping[str, Any]
"""What is kept of one run."""


def runs() -> None:
    """All that are not in the results yet."""
    target = FOLDER / "target"
    if not target.is_dir():
        words = ["train-target", CONFIG, "--out", str(target)]
        subprocess.run([sys.executable, "-c", "from paramlens.cli.main import entry; entry()", *words], check=True)
    found = _read() if RESULTS.exists() else {"machine": _processor(), "config": CONFIG, "shorter": SHORTER, "runs": {}}
    if any(name not in found["runs"].get(knob, {}) for knob, settings in RUNS.items() for name in settings):
        _decomposed({"steps": 2}, FOLDER / "warm", target)  # kernels compiled and loaded, outside of what is timed
    for knob, settings in RUNS.items():
        rows = found["runs"].setdefault(knob, {})
        for name, fields in settings.items():
            if name not in rows:
                path = FOLDER / f"{knob}-{name}".replace(" ", "-").replace(",", "")
                rows[name] = {"fields": fields, **_measured(fields, path, target)}
                RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(knob, name, rows[name].get("metrics", rows[name]), flush=True)


def _decomposed(fields: Mapping[str, object], path: Path, target: Path) -> Any:
    return decompose_config(load_config(CONFIG, overrides={**PAPER_FORM, **SHORTER, **fields}), out=path, target=target, overwrite=True)


def _measured(fields: Mapping[str, object], path: Path, target: Path) -> dict[str, object]:
    """One run and its circuit; of one that failed, its message. Seconds are the processor's, not the clock's."""
    began = time.process_time()
    try:
        _decomposed(fields, path, target)
    except ParamLensError as error:
        return {"failed": str(error)}
    seconds = time.process_time() - began
    run = open_run(path)
    found = circuit(run)
    last = [line["losses"] for line in run.metrics if "losses" in line][-10:]
    return {
        "steps": run.step,
        "seconds_per_step": seconds / run.step,
        "gamma_parameters": sum(value.numel() for value in run.importance.parameters()),
        "metrics": found.metrics,
        "minimality": sum(line["minimality"] for line in last) / len(last),
        "sites": {name: {"active": site.active, "unique": site.unique, "silent": site.silent} for name, site in found.sites.items()},
    }


def _read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def tables() -> None:
    found = _read()["runs"]
    for knob, rows in found.items():
        if knob != "shipped":
            print(f"\n{knob}\n")
            print(_table({"the recipe": found["shipped"]["shipped"], **rows}))
    C = {24: found["shipped"]["shipped"], **{int(name): row for name, row in found["C"].items()}}
    pressure = {0.2: found["shipped"]["shipped"], **{float(name): row for name, row in found["minimality"].items()}}
    columns = [("C, subcomponents a site", C, 24), ("coefficient of minimality", pressure, 0.2)]
    save_figure(_curves(columns), IMAGES / "choosing-C.svg", width=840, height=640)
    save_figure(_gammas(found), IMAGES / "choosing-gamma.svg", width=840, height=340)


def _table(rows: Mapping[str, Row]) -> str:
    columns = [
        "",
        "recon",
        "layerwise",
        "stochastic",
        "rounded",
        "adversarial",
        "faithfulness",
        *SHORT.values(),
        "unique",
        "at random",
        "s a step",
        "γ",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | {row['failed']} |")
            continue
        keys = ("recon", "recon_layerwise", "stochastic_recon", "recon_rounded", "recon_adversarial", "faithfulness")
        cells = [name, *(f"{row['metrics'][key]:.0e}" for key in keys)]
        cells += [f"{row['sites'][f'blocks.{site}']['active'][role]:.1f}" for site, role in HOME.items()]
        cells += [str(_unique(row)), f"{_at_random(row):.2f}", f"{row['seconds_per_step']:.3f}", f"{row['gamma_parameters']:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _at_role(row: Row) -> float:
    """Active parts of all sites, each at the role where the circuit reads it."""
    return sum(row["sites"][f"blocks.{site}"]["active"][role] for site, role in HOME.items())


def _unique(row: Row) -> int:
    return sum(site["unique"] for site in row["sites"].values())


def _at_random(row: Row) -> float:
    """Of the site that has most of them."""
    return max(site["active"]["random"] for site in row["sites"].values())


def _curves(columns: Sequence[tuple[str, Mapping[float, Row], float]]) -> go.Figure:
    """A column for every knob; a row for what is lost, one for how many parts are on, one for where they should not be."""
    panels: list[tuple[str, dict[str, Callable[[Row], float]]]] = [
        ("nats lost", {key: lambda row, key=key: row["metrics"][key] for key in ("recon", "recon_layerwise", "recon_adversarial")}),
        ("parts, all sites", {"active at their role": _at_role, "unique": _unique}),
        ("parts at random", {"of the site with most, at random positions": _at_random}),
    ]
    figure = make_subplots(3, 2, shared_xaxes=True, vertical_spacing=0.05, horizontal_spacing=0.1)
    for column, (label, rows, shipped) in enumerate(columns, 1):
        values = sorted(rows)
        colours = iter(COLOURS)
        for place, (title, curves) in enumerate(panels, 1):
            for name, of in curves.items():
                line = {"color": next(colours), "width": 1.6}
                y = [of(rows[value]) for value in values]
                figure.add_scatter(x=values, y=y, name=name, mode="lines+markers", line=line, showlegend=column == 1, row=place, col=column)
            figure.add_vline(x=shipped, line={"color": "#5c6672", "dash": "dot", "width": 1}, row=place, col=column)  # pyright: ignore[reportArgumentType]  # named as text
            kind: dict[str, Any] = {"type": "log", "tickformat": "~g", "dtick": 1} if place == 1 else {"rangemode": "tozero"}
            figure.update_yaxes(title=title if column == 1 else None, **kind, row=place, col=column)
        figure.update_xaxes(type="log", tickvals=values, row=3, col=column)
        figure.update_xaxes(title=label, row=3, col=column)
    figure.update_xaxes(type="log")
    return figure


def _gammas(found: Mapping[str, Mapping[str, Row]]) -> go.Figure:
    """Every γ by its parameters: what it loses, and what it leaves on at random positions. Numbers: d_gate."""
    rows = {"attention 8": found["shipped"]["shipped"], **found["γ"]}
    panels: list[tuple[str, Callable[[Row], float], tuple[int, int]]] = [
        ("recon, nats", lambda row: row["metrics"]["recon"], (-4, 0)),
        ("parts at random, of the site with most", _at_random, (-2, 1)),
    ]
    figure = make_subplots(1, 2, subplot_titles=[title for title, _, _ in panels], horizontal_spacing=0.1)
    for column, (_, of, (low, high)) in enumerate(panels, 1):
        for kind, colour in zip(GAMMA, COLOURS, strict=False):
            own = {name.split()[1]: row for name, row in rows.items() if name.split()[0] == kind}
            figure.add_scatter(
                x=[row["gamma_parameters"] for row in own.values()],
                y=[max(of(row), 10**low) for row in own.values()],
                text=list(own),
                textposition="top center",
                name=kind,
                mode="markers+text",
                marker={"color": colour, "size": 8},
                showlegend=column == 1,
                row=1,
                col=column,
            )
        figure.update_yaxes(type="log", tickformat="~g", dtick=1, range=[low - 0.1, high + 0.3], row=1, col=column)
    figure.update_xaxes(type="log", tickformat="~g", dtick=1, title="parameters of γ; numbers: d_gate")
    return figure


if __name__ == "__main__":
    commands: dict[str, Callable[[], None]] = {"runs": runs, "tables": tables}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    commands[sys.argv[1]]()
