"""Decompose induction-quick for several seeds, target and decomposition both seeded, and write docs/results/<name>.json.

    python benchmarks/induction_seeds.py                                    # seeds 0 to 4 as shipped
    python benchmarks/induction_seeds.py --name vector --gamma.kind vector  # the same with another γ, on the same targets

Prints the Markdown tables of docs/results.md. Runs go to runs/<name>-s<seed>; a finished one is read, not made again.
"""

import json
import platform
import statistics
import sys
from pathlib import Path

import torch

from paramlens import circuit, load_config, open_run
from paramlens.config import Config
from paramlens.configfile import parse_value
from paramlens.layout import read_json
from paramlens.runs import decompose_config
from paramlens.tracking import Terminal

BASE = "induction-quick"
SEEDS = range(5)
ROOT = Path(__file__).resolve().parents[1]


def main(words: list[str]) -> None:
    overrides = {flag.removeprefix("--"): parse_value(value) for flag, value in zip(words[::2], words[1::2], strict=True)}
    name = overrides.pop("name", BASE)
    rows = [measure(load_config(BASE, overrides={**overrides, "name": name, "seed": seed})) for seed in SEEDS]
    document = {"machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads", "seeds": rows}
    path = ROOT / "docs" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(tables(rows))


def measure(config: Config) -> dict[str, object]:
    """One seed: its target's last check, and the circuit with the keys of `circuit --json`."""
    path = ROOT / "runs" / f"{config.name}-s{config.seed}"
    finished = (path / "run.json").is_file() and read_json(path / "run.json").get("status") == "finished"
    if not finished:
        target = ROOT / "runs" / f"{BASE}-s{config.seed}"
        decompose_config(config, out=path, target=None if path == target else target, overwrite=True, tracker=Terminal(seconds=30))
    run = open_run(path)
    result = circuit(run)
    history = run.target_history
    assert history is not None
    last = history.checks[-1]
    lines = [line for line in run.metrics if "losses" in line][-10:]
    return {
        "seed": config.seed,
        "seconds": run.info["seconds"],
        "threads": run.info["threads"],
        "minimality": statistics.mean(line["losses"]["minimality"] for line in lines),
        "target": {
            "converged": history.converged,
            "attempts": history.attempts,
            "accuracy": last.accuracy,
            "loss": last.loss,
            "attention_m_s1": last.attention_m_s1,
            "attention_s2_m": last.attention_s2_m,
        },
        "sites": {name: {"active": site.active, "unique": site.unique, "silent": site.silent} for name, site in result.sites.items()},
        "metrics": result.metrics,
        "attention_kl": result.attention_kl,
    }


def tables(rows: list[dict]) -> str:
    """Targets, active subcomponents at each site's role and at random positions, metrics: one Markdown table each."""
    home = {"0.attn.q": "m", "0.attn.k": "s1", "0.attn.v": "s1", "1.attn.q": "s2", "1.attn.k": "m", "1.attn.v": "m"}
    columns = [str(row["seed"]) for row in rows] + ["median"]

    def line(label: str, values: list[float], form: str) -> str:
        return f"| {label} | " + " | ".join(form.format(value) for value in [*values, statistics.median(values)]) + " |"

    out = ["| seed | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for key, form in (("accuracy", "{:.4f}"), ("attention_m_s1", "{:.3f}"), ("attention_s2_m", "{:.3f}"), ("attempts", "{:.0f}")):
        out.append(line(f"target {key}", [row["target"][key] for row in rows], form))
    for site, role in home.items():
        name = f"blocks.{site}"
        out.append(line(f"{name} at {role}", [row["sites"][name]["active"][role] for row in rows], "{:.3f}"))
    for site in home:
        name = f"blocks.{site}"
        out.append(line(f"{name} at random", [row["sites"][name]["active"]["random"] for row in rows], "{:.3f}"))
    for site in home:
        name = f"blocks.{site}"
        out.append(line(f"{name} unique", [row["sites"][name]["unique"] for row in rows], "{:.0f}"))
    for key in rows[0]["metrics"]:
        out.append(line(key, [row["metrics"][key] for row in rows], "{:.4f}" if key.startswith("accuracy") else "{:.2e}"))
    for block, role in (("blocks.0.attn.pattern", "m"), ("blocks.1.attn.pattern", "s2")):
        out.append(line(f"attention_kl {block} at {role}", [row["attention_kl"][block][role] for row in rows], "{:.3f}"))
    out.append(line("minimality, end of training", [row["minimality"] for row in rows], "{:.3f}"))
    out.append(line("seconds", [row["seconds"] for row in rows], "{:.0f}"))
    return "\n".join(out)


if __name__ == "__main__":
    main(sys.argv[1:])
