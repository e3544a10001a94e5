"""What docs/choosing.md shows: induction-quick in 600 steps, one knob turned at a time, on one target.

    python benchmarks/choosing.py runs       what is not there yet; docs/results/choosing.json, about half an hour of one core
    python benchmarks/choosing.py tables     Markdown and the pictures of what is there

The target is trained first (`paramlens train-target induction-quick`), and every run is `paramlens decompose induction-quick --target ...`
with 600 steps, two fifths of the shipped 1500, and the fields named.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import log10
from pathlib import Path
from typing import Any

import torch

from paramlens import circuit, decompose_config, load_config, open_run
from paramlens.baselines.bench import _processor
from paramlens.errors import ParamLensError

CONFIG = "induction-quick"
HOME = {"0.attn.q": "m", "0.attn.k": "s1", "0.attn.v": "s1", "1.attn.q": "s2", "1.attn.k": "m", "1.attn.v": "m"}
"""Site → the role at which the paper's circuit reads it (Table 1a)."""
SHORT = {site: f"{site[-1].upper()}{site[0]}" for site in HOME}
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
"""Knob → its setting → the fields that differ from the shipped recipe."""
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "choosing.json"
IMAGES = ROOT / "docs" / "images"
FOLDER = ROOT / "runs" / "choosing"
COLOURS = ("#1a6f78", "#b4500f", "#6b3fa0", "#5c6672")
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
    return decompose_config(load_config(CONFIG, overrides={**SHORTER, **fields}), out=path, target=target, overwrite=True)


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
            print(_table({"as shipped": found["shipped"]["shipped"], **rows}))
    C = {24: found["shipped"]["shipped"], **{int(name): row for name, row in found["C"].items()}}
    pressure = {0.2: found["shipped"]["shipped"], **{float(name): row for name, row in found["minimality"].items()}}
    columns = [("C, subcomponents a site", C, 24), ("coefficient of minimality", pressure, 0.2)]
    (IMAGES / "choosing-C.svg").write_text(_drawn(*_curves(columns)), encoding="utf-8")
    (IMAGES / "choosing-gamma.svg").write_text(_drawn(*_gammas(found)), encoding="utf-8")


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


@dataclass(frozen=True)
class Axis:
    """From values to pixels, and where its ticks are."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    is_log: bool = True

    def at(self, value: float) -> float:
        low, high, value = (log10(v) if self.is_log else v for v in (self.low, self.high, max(value, self.low)))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _frame(x: Axis, y: Axis, *, above: str = "", below: str = "") -> list[str]:
    parts = [f'<path class="f" d="M{x.start} {y.end}V{y.start}H{x.end}"/>']
    for tick in x.ticks:
        parts.append(f'<path class="f" d="M{x.at(tick):.1f} {y.start}v4"/>')
        parts.append(f'<text x="{x.at(tick):.1f}" y="{y.start + 17}" text-anchor="middle">{_number(tick)}</text>')
    for tick in y.ticks:
        parts.append(f'<path class="g" d="M{x.start} {y.at(tick):.1f}H{x.end}"/>')
        parts.append(f'<text x="{x.start - 6}" y="{y.at(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    parts.append(f'<text class="t" x="{x.start}" y="{y.end - 10}">{escape(above)}</text>')
    parts.append(f'<text x="{(x.start + x.end) / 2}" y="{y.start + 35}" text-anchor="middle">{escape(below)}</text>')
    return parts


def _number(value: float) -> str:
    return f"{value:,g}" if value == 0 or 0.01 <= value < 1e6 else f"1e{round(log10(value))}"


def _curves(columns: Sequence[tuple[str, Mapping[float, Row], float]]) -> tuple[list[str], int, int]:
    """A column for every knob; a row for what is lost, one for how many parts are on, one for where they should not be."""
    panels: list[tuple[str, dict[str, Callable[[Row], float]], tuple[float, float], Sequence[float], bool]] = [
        (
            "what is lost, nats",
            {key: lambda row, key=key: row["metrics"][key] for key in ("recon", "recon_layerwise", "recon_adversarial")},
            (1e-4, 20),
            (1e-4, 1e-3, 1e-2, 1e-1, 1, 10),
            True,
        ),
        ("parts, all sites", {"active at their role": _at_role, "unique": _unique}, (0, 130), (0, 25, 50, 75, 100, 125), False),
        ("parts at random positions", {"of the site with most": _at_random}, (0, 3.6), (0, 1, 2, 3), False),
    ]
    parts: list[str] = []
    for column, (label, rows, shipped) in enumerate(columns):
        values = sorted(rows)
        x = Axis(values[0] / 1.15, values[-1] * 1.15, 60 + 400 * column, 310 + 400 * column, values)
        top = 40
        for i, (title, curves, (low, high), ticks, is_log) in enumerate(panels):
            y = Axis(low, high, top + 150, top, ticks, is_log)
            parts += _frame(x, y, above=title, below=label if i == len(panels) - 1 else "")
            parts.append(f'<path class="s" d="M{x.at(shipped):.1f} {y.start}V{y.end}"/>')
            ends: list[float] = []
            for (name, of), colour in zip(curves.items(), COLOURS, strict=False):
                points = [(x.at(value), y.at(of(rows[value]))) for value in values]
                parts.append(f'<polyline stroke="{colour}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>')
                parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
                end = points[-1][1] + 4
                while any(abs(end - other) < 13 for other in ends):
                    end -= 3
                ends.append(end)
                parts.append(f'<text x="{x.end + 4}" y="{end:.1f}" style="fill:{colour}">{escape(name)}</text>')
            top += 205
    return parts, 840, 640


def _gammas(found: Mapping[str, Mapping[str, Row]]) -> tuple[list[str], int, int]:
    """Every γ by its parameters: what it loses, and what it leaves on at random positions."""
    rows = {"attention 8": found["shipped"]["shipped"], **found["γ"]}
    sizes = [1e3, 1e4, 1e5]
    parts: list[str] = []
    for column, (title, of, y_low, y_high, ticks) in enumerate(
        [
            ("recon, nats", lambda row: row["metrics"]["recon"], 1e-4, 1, (1e-4, 1e-3, 1e-2, 1e-1, 1)),
            ("parts at random positions, of the site with most", _at_random, 0.01, 10, (0.01, 0.1, 1, 10)),
        ]
    ):
        x = Axis(700, 2e5, 60 + 400 * column, 390 + 400 * column, sizes)
        y = Axis(y_low, y_high, 240, 40, ticks)
        parts += _frame(x, y, above=title, below="parameters of γ")
        for name, row in rows.items():
            kind, width = name.split()
            colour = COLOURS[list(GAMMA).index(kind)]
            a, b = x.at(row["gamma_parameters"]), y.at(of(row))
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>')
            parts.append(f'<text x="{a + 6:.1f}" y="{b + (14 if kind == "shared" else -4):.1f}" style="fill:{colour}">{width}</text>')
    for i, kind in enumerate(GAMMA):
        parts.append(f'<circle cx="{66 + 110 * i}" cy="306" r="4" fill="{COLOURS[i]}"/><text x="{76 + 110 * i}" y="310">{kind}</text>')
    parts.append('<text x="516" y="310">numbers: d_gate</text>')
    return parts, 840, 325


def _drawn(parts: Sequence[str], width: int, height: int) -> str:
    style = (
        "text{font:11px system-ui,sans-serif;fill:#1c2430}.t{font-weight:600;font-size:12px}polyline{fill:none;stroke-width:1.6}"
        ".f{stroke:#5c6672;fill:none}.g{stroke:#e4e8ee;fill:none}.s{stroke:#5c6672;stroke-dasharray:3 3;fill:none}"
    )
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return f'{frame}<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'


if __name__ == "__main__":
    commands: dict[str, Callable[[], None]] = {"runs": runs, "tables": tables}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    commands[sys.argv[1]]()
