"""Table 4's own losses and coefficients on the induction head, at growing lengths.

    python benchmarks/table4.py runs [SEED ...]               # default 1 2, one thread, about an hour a seed; goes on where it was stopped
    python benchmarks/table4.py gpu STEPS BATCH [SEED ...]    # the same on a GPU, with Table 4's d_gate
    python benchmarks/table4.py tables                        # its table, in Markdown

Runs go to runs/table4; every finished one adds its figures to docs/results/table4.json.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from studies import HOME, SHORT, each_once

from paramlens import circuit, load_config, open_run
from paramlens.analysis.held_out import divergences, held_out
from paramlens.files.plain import read_json
from paramlens.method.generators import generator
from paramlens.method.losses.divergence import LossAt
from paramlens.method.losses.reconstruction import RECONSTRUCTIONS
from paramlens.runs.decompose import decompose_config
from paramlens.runs.layout import is_run
from paramlens.runs.rundir import Run
from paramlens.runs.target_training import train_target

ROOT = Path(__file__).resolve().parents[1]
RESULTS, RUNS = ROOT / "docs/results/table4.json", ROOT / "runs/table4"
STEPS = (800, 3200, 11000)
BATCHES = 4
SMALLER: dict[str, object] = {"batch": 32, "gamma.d_gate": 8}
"""Where it is smaller than Tables 3 and 4, besides the steps and the target's training (that of induction-quick)."""


def runs(seeds: Sequence[int]) -> None:
    each_once(
        RESULTS, {f"{steps} steps, seed {seed}": partial(_measured, SMALLER | {"steps": steps}, seed) for seed in seeds for steps in STEPS}
    )


def gpu(steps: int, batch: int, seeds: Sequence[int]) -> None:
    fields = {"steps": steps, "batch": batch, "device": "cuda", "cuda_graph": True}
    each_once(RESULTS, {f"{steps} steps of {batch} on a GPU, seed {seed}": partial(_measured, fields, seed) for seed in seeds})


def _run(fields: Mapping[str, object], seed: int) -> Run:
    name = "-".join(str(fields[key]) for key in ("steps", "batch"))
    target, out = RUNS / f"target-s{seed}", RUNS / f"{name}-s{seed}"
    quick = load_config("induction-quick", overrides={"seed": seed, "threads": 1})
    if not (target / "target.json").is_file():
        train_target(quick, out=target)
    if is_run(out) and open_run(out).status == "finished":
        return open_run(out)
    own = {"seed": seed, "threads": 1, "evaluate.every": 100000, "task": quick.task.model_dump()}
    return decompose_config(load_config("induction", overrides={**own, **fields}), out=out, target=target, overwrite=out.exists())


def _measured(fields: Mapping[str, object], seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    run = _run(fields, seed)
    found = circuit(run, batches=BATCHES)
    layerwise = {name: [0.0] * len(SHORT) for name in ("recon_layerwise", "stochastic_recon_layerwise")}
    for batch in held_out(run, batches=BATCHES):
        at = LossAt(last_token_only=True, present=batch.batch.present)
        for name, sums in layerwise.items():
            plans = list(RECONSTRUCTIONS[name].plans(batch.g, generator=generator(0, "table 4")))
            with torch.no_grad():
                found_here = divergences(run.decomposition, batch.batch.inputs, plans, at=at, log_probs=at.log_probs(batch.target.logits))
            layerwise[name] = [total + value / BATCHES for total, value in zip(sums, found_here, strict=True)]
    return {
        "seconds": run.info["seconds"],
        "metrics": found.metrics,
        "layerwise": {name: dict(zip(SHORT.values(), values, strict=True)) for name, values in layerwise.items()},
        "active": {SHORT[site]: found.sites[f"blocks.{site}"].active[role] for site, role in HOME.items()},
        "unique": sum(site.unique for site in found.sites.values()),
    }


def tables() -> None:
    found = read_json(RESULTS)
    names = ("recon", "stochastic_recon", "recon_layerwise", "faithfulness")
    heads = (
        "steps",
        "seed",
        *SHORT.values(),
        "unique",
        *names,
        "stochastic layerwise",
        "layerwise at Q0, K0",
        "stochastic layerwise at Q0, K0",
        "seconds",
    )
    print(f"| {' | '.join(heads)} |\n|{'---:|' * len(heads)}")
    for key, row in found["runs"].items():
        steps, seed = key.split(", seed ")
        layerwise = row["layerwise"]
        cells = [steps.removesuffix(" steps"), seed, *(f"{value:.1f}" for value in row["active"].values()), f"{row['unique']}"]
        cells += [f"{row['metrics'][name]:.1e}" for name in names]
        stochastic = list(layerwise["stochastic_recon_layerwise"].values())
        cells += [f"{sum(stochastic) / len(stochastic):.1e}"]
        cells += [", ".join(f"{values[site]:.1e}" for site in ("Q0", "K0")) for values in layerwise.values()]
        print(f"| {' | '.join(cells)} | {row['seconds']:.0f} |")


if __name__ == "__main__":
    if sys.argv[1] == "runs":
        runs([int(seed) for seed in sys.argv[2:]] or [1, 2])
    elif sys.argv[1] == "gpu":
        steps, batch, *seeds = map(int, sys.argv[2:])
        gpu(steps, batch, seeds or [1])
    else:
        tables()
