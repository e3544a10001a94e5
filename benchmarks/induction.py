"""The induction-head experiment as docs/results-induction.md has it; each part resumes what is there and writes docs/results/<part>.json.

    python benchmarks/induction.py seeds       # Table 1: five seeds, each its own target; circuit and svd of each
    python benchmarks/induction.py agreement   # three seeds of one target, started from random rotations
    python benchmarks/induction.py ablations   # one part of the method taken away at a time
    python benchmarks/induction.py bounds      # the least KL that few rank-1 terms reach in the first block's queries and keys
    python benchmarks/induction.py quick       # docs/results.md: the paper's own losses on five targets of induction-quick
    python benchmarks/induction.py vector      # the same on the same targets with the vector γ
    python benchmarks/induction.py tables      # Markdown of all that docs/results holds

Runs go to runs/; as many at a time as there are cores.
"""

import json
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from paper_form import PAPER_FORM
from studies import HOME, SHORT

from paramlens import Run, agreement, circuit, load_config, open_run, svd_baseline
from paramlens.config.model import Config
from paramlens.errors import ParamLensError
from paramlens.files.plain import read_json
from paramlens.method.losses.divergence import kl_divergence
from paramlens.runs.seeds import decompose_seeds
from paramlens.tasks.induction.sequences import ROLES, induction_batch
from paramlens.tasks.induction.task import InductionTask

CONFIG = "induction-cpu"
QUICK = "induction-quick"
SEEDS = 5
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
RUNS = ROOT / "runs"

SHORTER = {"C": 24, "steps": 800, "checkpoint.every": 800, "evaluate.every": 800}
"""What makes a run short enough for many of them."""
ABLATIONS: dict[str, dict[str, object]] = {
    "as it is": {},
    "γ vector": {"gamma.kind": "vector"},
    "γ scalar": {"gamma.kind": "scalar"},
    "without layerwise": {"losses.stochastic_recon_layerwise": 0.0, "losses.recon_layerwise": 0.0},
    "losses of Table 4: without recon_layerwise": {"losses.recon_layerwise": 0.0},
    "without stochastic": {"losses.stochastic_recon": 0.0, "losses.stochastic_recon_layerwise": 0.0},
    "without recon": {"losses.recon": 0.0, "losses.recon_layerwise": 0.0},
    "p fixed at 0.9": {"losses.p_final": 0.9},
    "p fixed at 0.1": {"losses.p_start": 0.1},
    "without projection": {"optim.project_from": None},
    "without projection, three times the steps": {"optim.project_from": None, "steps": 2400},
}
"""What is taken away → the fields that differ."""
ABLATION_SEED = 1
"""The first of the two seeds."""


def seeds() -> None:
    config = load_config(CONFIG)
    _decompose(config, SEEDS, RUNS / CONFIG)
    _write("induction", {"config": CONFIG, "seeds": [_measure(RUNS / CONFIG / f"s{seed}", svd=True) for seed in range(SEEDS)]})


def quick() -> None:
    _decompose(load_config(QUICK, overrides=PAPER_FORM), SEEDS, RUNS / QUICK)
    _write(QUICK, {"config": QUICK, "seeds": [_measure(RUNS / QUICK / f"s{seed}") for seed in range(SEEDS)]})


def vector() -> None:
    fields = PAPER_FORM | {"gamma.kind": "vector"}
    _decompose(load_config(QUICK, overrides=fields), SEEDS, RUNS / "vector", target=RUNS / QUICK / "s{seed}")
    rows = [_measure(RUNS / "vector" / f"s{seed}") for seed in range(SEEDS)]
    _write("vector", {"config": QUICK, "fields": fields, "seeds": rows})


def agree() -> None:
    """Random rotations of the SVD as starts: from the SVD itself all seeds would begin alike."""
    fields = {**SHORTER, "init.kind": "svd_rotated"}
    folder, count = RUNS / "agreement", 3
    _decompose(load_config(CONFIG, overrides=fields), count, folder, target=RUNS / CONFIG / f"s{ABLATION_SEED}")
    found = agreement([open_run(folder / f"s{seed}") for seed in range(count)]).to_json()
    found["runs"] = [f"runs/agreement/s{seed}" for seed in range(count)]
    _write("agreement", {"config": CONFIG, "fields": fields, "agreement": found})


def ablations() -> None:
    rows: dict[str, list[dict[str, object]]] = {}
    for i, (name, fields) in enumerate(ABLATIONS.items()):
        folder = RUNS / "ablations" / str(i)
        config = load_config(CONFIG, overrides={**SHORTER, **fields, "seed": ABLATION_SEED})
        _decompose(config, 2, folder, target=RUNS / CONFIG / "s{seed}")
        rows[name] = [_measure(folder / f"s{seed}") for seed in (ABLATION_SEED, ABLATION_SEED + 1)]
        _write("ablations", {"config": CONFIG, "shorter": SHORTER, "fields": ABLATIONS, "rows": rows})


def _decompose(config: Config, count: int, folder: Path, *, target: Path | None = None) -> None:
    """All seeds that are not finished yet; one that fails is told and left, so that it stands in the table."""
    try:
        decompose_seeds(config, count, out=folder, target=target, resume=True)
    except ParamLensError as error:
        print(f"{folder}: {error}", file=sys.stderr)


def bounds() -> None:
    """The least KL with k rank-1 terms of any kind, on at m (Q0) or s1 (K0) only; every other site is as in the target.

    Neither faithfulness nor other masks constrain them. So this is the best that a decomposition with k unique subcomponents there could
    reach, as far as the descent finds it.
    """
    rows = []
    for seed in range(SEEDS):
        run = open_run(RUNS / CONFIG / f"s{seed}")
        least = {
            f"{SHORT[site]} {k}": _least_kl(run, f"blocks.{site}", HOME[site], k) for site in ("0.attn.q", "0.attn.k") for k in (1, 2, 3)
        }
        rows.append({"seed": seed, "least_kl": least})
        _write("bounds", {"config": CONFIG, "seeds": rows})


def _least_kl(run: Run, site: str, role: str, k: int, *, steps: int = 400) -> float:
    """By Adam on the factors from the leading singular pairs, 256 new sequences a step; mean over the last 20 steps, at a rate near 0."""
    model, config = run.decomposition.model, run.config
    assert isinstance(config.task, InductionTask)
    module = model.get_submodule(site)
    left, singular, right = torch.linalg.svd(module.get_parameter("weight").detach().T)
    U, V = ((part * singular[:k].sqrt()).clone() for part in (left[:, :k], right[:k].T))
    parameters = [U.requires_grad_(), V.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    seen: list[float] = []
    for step in range(steps):
        batch = induction_batch(config.task, seed=config.seed, stream="bounds", step=step, batch=256)
        assert batch.roles is not None
        here = (batch.roles == ROLES.index(role))[..., None]
        with torch.no_grad():
            target = model(batch.inputs, last_token_only=True).log_softmax(-1)
        hook = module.register_forward_hook(lambda _module, args, _output, here=here: args[0] @ U @ V.T * here)
        divergence = kl_divergence(target, model(batch.inputs, last_token_only=True)[None])[0]
        hook.remove()
        optimizer.zero_grad()
        divergence.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        seen.append(divergence.item())
    return statistics.mean(seen[-20:])


def _measure(path: Path, *, svd: bool = False) -> dict[str, object]:
    """One seed, with the keys of `circuit --json`; of a run that failed, what happened to it."""
    if not (path / "run.json").is_file():
        return {"seed": int(path.name.removeprefix("s")), "status": "failed"}
    info = read_json(path / "run.json")
    row: dict[str, object] = {"seed": info["seed"], "status": info["status"], "steps": info["steps"], "seconds": info["seconds"]}
    if info["status"] != "finished":
        return row
    run = open_run(path)
    result = circuit(run)
    run.save_analysis("circuit", result.to_json())
    history = run.target_history
    assert history is not None
    row |= {
        "threads": info["threads"],
        "target": {"converged": history.converged, "attempts": history.attempts, **vars(history.checks[-1])},
        "sites": {name: {"active": site.active, "unique": site.unique, "silent": site.silent} for name, site in result.sites.items()},
        "metrics": result.metrics | {"minimality": _last_minimality(run.metrics)},
        "attention_kl": result.attention_kl,
        "attention_by_role": result.to_json()["attention_by_role"],
        "interventions": result.to_json()["interventions"],
        "maps": result.to_json()["maps"],
    }
    if svd:
        baseline = svd_baseline(run)
        run.save_analysis("svd", baseline.to_json())
        row["svd"] = {
            **{key: baseline.to_json()[key] for key in ("tolerance", "kl", "ranks", "factor_active", "factor_unique", "decomposition")},
            "rank_at": {f"{tolerance:.0e}": baseline.rank_at(tolerance) for tolerance in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)},
        }
    return row


def _last_minimality(metrics: Sequence[Mapping[str, Any]]) -> float:
    return statistics.mean(line["losses"]["minimality"] for line in [line for line in metrics if "losses" in line][-10:])


def _write(name: str, document: Mapping[str, object]) -> None:
    RESULTS.mkdir(exist_ok=True)
    whole = {"machine": platform.processor() or platform.machine(), **document}
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def tables() -> None:
    found = _read("induction")["seeds"]
    print(_seed_table(found))
    print(_table(["change", "KL", "accuracy", "attention m→s1", "attention s2→m"], _intervention_lines(found)))
    print(_table(["KL up to", "SVD", "active", "unique"], _svd_lines(found)))
    alike = _read("agreement")["agreement"]["sites"]
    print(_table(["site", "agreement", "direction", "by chance", "pattern", "subcomponents"], _agreement_lines(alike)))
    least = _read("bounds")["seeds"]
    print(_table(["rank-1 terms", *(str(row["seed"]) for row in least), "median"], _bound_lines(least)))
    columns = ["", "recon", "layerwise", "rounded", "adversarial", "faithfulness", *SHORT.values(), "most at random"]
    print(_table(columns, _ablation_lines(_read("ablations")["rows"])))
    for name in (QUICK, "vector"):
        print(_seed_table(_read(name)["seeds"]))


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _seed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    return _table(["seed", *(str(row["seed"]) for row in rows), "median"], _seed_lines(rows))


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [columns, ["---", *["---:"] * (len(columns) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _seed_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    def line(label: str, form: str, value: Callable[[Any], float | None]) -> list[str]:
        values = [value(row) if row["status"] == "finished" else None for row in rows]
        known = [each for each in values if each is not None]
        return [label, *["failed" if each is None else form.format(each) for each in values], form.format(statistics.median(known))]

    site = "blocks.{}".format
    lines = [
        line(f"target {label}", form, lambda row, key=key: row["target"][key])
        for key, label, form in (
            ("loss", "loss", "{:.1e}"),
            ("attention_m_s1", "attention m→s1", "{:.3f}"),
            ("attention_s2_m", "attention s2→m", "{:.3f}"),
            ("attempts", "attempts", "{}"),
        )
    ]
    for label, form, value in (
        ("{} active at {}", "{:.2f}", lambda row, name: row["sites"][site(name)]["active"][HOME[name]]),
        ("{} unique", "{:.0f}", lambda row, name: row["sites"][site(name)]["unique"]),
        ("{} active at random", "{:.3f}", lambda row, name: row["sites"][site(name)]["active"]["random"]),
    ):
        lines += [line(label.format(SHORT[name], HOME[name]), form, lambda row, n=name, v=value: v(row, n)) for name in HOME]
    first = next(row for row in rows if row["status"] == "finished")
    for key in first["metrics"]:
        lines.append(line(key, "{:.4f}" if key.startswith("accuracy") else "{:.1e}", lambda row, key=key: row["metrics"][key]))
    lines.append(line("attention KL, block 0 at m", "{:.3f}", lambda row: row["attention_kl"]["blocks.0.attn.pattern"]["m"]))
    lines.append(line("attention KL, block 1 at s2", "{:.4f}", lambda row: row["attention_kl"]["blocks.1.attn.pattern"]["s2"]))
    if "svd" in first:
        lines.append(line("SVD rank at the same KL", "{:.0f}", lambda row: sum(row["svd"]["ranks"].values())))
        lines.append(line("over active subcomponents", "{:.1f}", lambda row: row["svd"]["factor_active"]))
        lines.append(line("over unique subcomponents", "{:.2f}", lambda row: row["svd"]["factor_unique"]))
    lines.append(line("seconds", "{:.0f}", lambda row: row["seconds"]))
    return lines


def _intervention_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    finished = [row["interventions"] for row in rows if row["status"] == "finished"]
    lines = []
    for each in zip(*finished, strict=True):
        numbers = [
            f"{statistics.median(change['kl'] for change in each):.1e}",
            f"{statistics.median(change['accuracy'] for change in each):.3f}",
            *(f"{statistics.median(change['attention'][link] for change in each):.3f}" for link in each[0]["attention"]),
        ]
        lines.append([each[0]["name"], *numbers])
    return lines


def _svd_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    finished = [row["svd"] for row in rows if row["status"] == "finished"]
    lines = []
    for tolerance in finished[0]["rank_at"]:
        counts: dict[str, list[float]] = {"active": [], "unique": []}
        for svd in finished:
            held = [point for point in svd["decomposition"] if point["kl"] <= float(tolerance)]
            for name, values in counts.items():
                values.extend([min(sum(point[name].values()) for point in held)] if held else [])
        ours = [
            f"{statistics.median(values):.1f}" + ("" if len(values) == len(finished) else f" ({len(values)} seeds)") if values else "–"
            for values in counts.values()
        ]
        lines.append([tolerance, f"{statistics.median(svd['rank_at'][tolerance] for svd in finished):.0f}", *ours])
    return lines


def _agreement_lines(sites: Mapping[str, Any]) -> list[list[str]]:
    keys = ("agreement", "direction", "chance", "pattern")
    return [[name, *(f"{site[key]:.3f}" for key in keys), f"{statistics.mean(site['parts']):.1f}"] for name, site in sites.items()]


def _bound_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    lines = []
    for name in rows[0]["least_kl"]:
        values = [row["least_kl"][name] for row in rows]
        lines.append([name, *(f"{value:.1e}" for value in [*values, statistics.median(values)])])
    return lines


def _ablation_lines(taken: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    lines = []
    for name, rows in taken.items():
        finished = [row for row in rows if row["status"] == "finished"]
        cells = [
            " / ".join(f"{row['metrics'][key]:.0e}" for row in finished)
            for key in ("recon", "recon_layerwise", "recon_rounded", "recon_adversarial", "faithfulness")
        ]
        cells += [" / ".join(f"{row['sites'][f'blocks.{site}']['active'][HOME[site]]:.1f}" for row in finished) for site in HOME]
        cells.append(" / ".join(f"{max(site['active']['random'] for site in row['sites'].values()):.2f}" for row in finished))
        lines.append([name, *cells])
    return lines


if __name__ == "__main__":
    parts = {
        "seeds": seeds,
        "agreement": agree,
        "ablations": ablations,
        "bounds": bounds,
        "quick": quick,
        "vector": vector,
        "tables": tables,
    }
    parts[sys.argv[1]]()
