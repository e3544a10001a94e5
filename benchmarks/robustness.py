"""What the remainder Δ, merging and the adversary buy, on the induction head: one added at a time, each on the same targets.

    python benchmarks/robustness.py runs [SEED ...] [VARIANT ...]    # default: seeds 1 2, all variants; goes on where it was stopped
    python benchmarks/robustness.py tables                           # its tables, in Markdown

One thread. Runs go to runs/robustness; every finished one adds its figures to docs/results/robustness.json.
"""

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paper_form import PAPER_FORM
from studies import HOME, SHORT, each_once

from paramlens import circuit, load_config, open_run
from paramlens.analysis.circuit import Circuit
from paramlens.files.plain import read_json
from paramlens.runs.decompose import decompose_config
from paramlens.runs.layout import is_run
from paramlens.runs.rundir import Run
from paramlens.runs.target_training import train_target

ROOT = Path(__file__).resolve().parents[1]
RESULTS, RUNS = ROOT / "docs/results/robustness.json", ROOT / "runs/robustness"
BATCHES, STEPS = 4, 320

DELTA: dict[str, object] = {"delta": True, "losses.faithfulness": 0.0}
MERGE = DELTA | {"merge.every": 50}
FULL = MERGE | {"losses.adversarial": 1.0, "optim.project_from": None}
ONE_IN_64: dict[str, object] = {"task.shuffled": 1 / 64, "losses.recon_layerwise": 8.0, "losses.minimality": 0.3}
HALF: dict[str, object] = {"losses.adversarial": 0.5}
VARIANTS: dict[str, dict[str, object]] = {
    "the paper's losses": {},
    "Δ": DELTA,
    "Δ, merging": MERGE,
    "adversary": {"losses.adversarial": 1.0},
    "Δ, adversary": DELTA | {"losses.adversarial": 1.0},
    "Δ, merging, adversary": MERGE | {"losses.adversarial": 1.0},
    "Δ, merging, adversary, a quarter shuffled": MERGE | {"losses.adversarial": 1.0, "task.shuffled": 0.25},
    "Δ, merging, adversary, second stream": MERGE
    | {"losses.adversarial": 1.0, "task.elsewhere": 16, "losses.elsewhere": 1.0, "losses.elsewhere_masks": "all"},
    "Δ, merging, adversary, smooth": MERGE
    | {"losses.adversarial": 1.0, "losses.minimality": 0.0, "losses.smooth_minimality": 0.05, "optim.clip": 1.0},
    "C 100": {"C": 100},
    "C 100: Δ, merging": MERGE | {"C": 100},
    "C 100: Δ, merging, adversary": MERGE | {"losses.adversarial": 1.0, "C": 100},
    "long, C 24": FULL | {"C": 24},
    "long, C 24, an eighth shuffled": FULL | {"C": 24, "task.shuffled": 0.125},
    "long, C 24, one in 64 shuffled": FULL | ONE_IN_64 | {"C": 24},
    "long, C 24, one in 64 shuffled, half the adversary": FULL | ONE_IN_64 | HALF | {"C": 24},
    "long, C 100": FULL,
    "long, C 100, an eighth shuffled": FULL | {"task.shuffled": 0.125},
    "long, C 100, one in 64 shuffled, half the adversary": FULL | ONE_IN_64 | HALF,
}
"""Name → the fields in which it differs from `PAPER_FORM`, or, where it is long, from induction-cpu."""


def runs(seeds: Sequence[int], variants: Sequence[str]) -> None:
    each_once(RESULTS, {f"{variant}, seed {seed}": partial(_measured, variant, seed) for seed in seeds for variant in variants})


def _run(variant: str, seed: int) -> Run:
    recipe, base = ("induction-cpu", {}) if variant.startswith("long") else ("induction-quick", PAPER_FORM)
    config = load_config(recipe, overrides=base | VARIANTS[variant] | {"seed": seed, "threads": 1, "evaluate.every": 1500})
    folder = variant.replace(" ", "-").replace(",", "").replace(":", "")
    target, out = RUNS / f"target-{config.name.removeprefix('induction-')}-s{seed}", RUNS / f"{folder}-s{seed}"
    if not (target / "target.json").is_file():
        train_target(config, out=target)
    if is_run(out) and open_run(out).status == "finished":
        return open_run(out)
    return decompose_config(config, out=out, target=target, overwrite=out.exists())


def _measured(variant: str, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    run = _run(variant, seed)
    found: Circuit = circuit(run, batches=BATCHES, adversary=STEPS)
    active = {name: found.sites[f"blocks.{name}"].active[role] for name, role in HOME.items()}
    return {
        "seconds": run.info["seconds"],
        "metrics": found.metrics,
        "ladder": [[rung.steps, rung.one_start, rung.worst, rung.share] for rung in found.adversary],
        "attacked": found.attacked,
        "off data": None if found.off_data is None else found.off_data.recon,
        "off data, Δ on": None if found.off_data is None else found.off_data.with_remainder,
        "active": active,
        "at random": {name: found.sites[f"blocks.{name}"].active["random"] for name in HOME},
        "unique": sum(site.unique for site in found.sites.values()),
        "left": sum(run.decomposition.C.values()),
        "remainder": None if not run.decomposition.delta else run.decomposition.remainders(),
    }


def _rows() -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    found = read_json(RESULTS)["runs"]
    for variant in VARIANTS:
        of_seed = {int(key.rpartition(" ")[2]): row for key, row in found.items() if key.rpartition(", seed ")[0] == variant}
        rows = [of_seed[seed] for seed in sorted(of_seed)]
        if rows:
            yield variant, rows


def tables() -> None:
    heads = (
        "variant",
        "worst of 8, 320 steps, nats",
        "share of all off",
        "one start, 20 steps",
        "stochastic",
        "recon",
        "layerwise",
        "rounded",
    )
    print(f"| {' | '.join((*heads, 'off the data', 'seconds'))} |\n|---{'|---:' * (len(heads) + 1)}|")
    for variant, rows in _rows():
        cells = [
            _each([row["ladder"][-1][2] for row in rows], ".2f"),
            _each([row["ladder"][-1][3] for row in rows], ".2f"),
            _each([row["ladder"][0][1] for row in rows], ".2f"),
            *(
                _each([row["metrics"][name] for row in rows], ".1e")
                for name in ("stochastic_recon", "recon", "recon_layerwise", "recon_rounded")
            ),
            _each([row["off data"] for row in rows], ".1f"),
            _each([row["seconds"] for row in rows], ".0f"),
        ]
        print(f"| {variant} | {' | '.join(cells)} |")
    heads = (*SHORT.values(), "unique", "left", "‖Δ‖ / ‖W‖, most")
    print(f"\n| variant | {' | '.join(heads)} |\n|---{'|---:' * len(heads)}|")
    for variant, rows in _rows():
        cells = [_each([row["active"][name] for row in rows], ".1f") for name in HOME]
        most = [max(row["remainder"].values()) for row in rows if row["remainder"] is not None]
        cells += [_each([row[key] for row in rows], ".0f") for key in ("unique", "left")] + [_each(most, ".2f") if most else "-"]
        print(f"| {variant} | {' | '.join(cells)} |")


def _each(values: list[float], form: str) -> str:
    """All seeds, or the median and the largest of more than three."""
    if len(values) <= 3:
        return ", ".join(f"{value:{form}}" for value in values)
    return f"{statistics.median(values):{form}} ({max(values):{form}})"


if __name__ == "__main__":
    if sys.argv[1] == "runs":
        seeds = [int(each) for each in sys.argv[2:] if each.isdecimal()] or [1, 2]
        runs(seeds, [each for each in sys.argv[2:] if not each.isdecimal()] or list(VARIANTS))
    else:
        tables()
