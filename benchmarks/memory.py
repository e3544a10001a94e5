"""What `paramlens doctor` foretells of a step's memory against what a process takes: the table in docs/results.md.

python benchmarks/memory.py        # Markdown; about a minute
"""

from paramlens import load_config
from paramlens.bench import peak
from paramlens.budget import diagnose
from paramlens.sites import find_sites
from paramlens.tasks.induction import InductionTransformer

CASES = {
    "induction-quick": ("induction-quick", {}),
    "induction, batch 64": ("induction", {"batch": 64}),
    "induction, batch 128": ("induction", {"batch": 128}),
    "induction, batch 64, loss on all tokens": ("induction", {"batch": 64, "last_token_only": False}),
    "induction, batch 64, γ scalar": ("induction", {"batch": 64, "gamma.kind": "scalar"}),
    "induction, batch 128, γ vector": ("induction", {"batch": 128, "gamma.kind": "vector"}),
}


def main() -> None:
    print("| configuration | foretold, MiB | measured, MiB |\n|---|---:|---:|")
    for name, (base, overrides) in CASES.items():
        config = load_config(base, overrides={**overrides, "threads": 1})
        task = config.task
        sites = find_sites(InductionTransformer(task), config.sites)
        told = diagnose(config, sites, length=task.length, vocabulary=task.vocabulary + 1).bytes
        beyond = told["total"] - told["U and V"] - told["gamma"]
        print(f"| {name} | {beyond / 2**20:.0f} | {peak(config, 'ours') / 2**20:.0f} |", flush=True)


if __name__ == "__main__":
    main()
