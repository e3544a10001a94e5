"""The estimate of a run's memory against the peak of a process that makes two steps of it: the table in docs/performance.md.

python benchmarks/memory.py        # Markdown; about five minutes, up to 4 GB
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from paramlens import decompose, load_config
from paramlens.method.sites import find_sites
from paramlens.runs.budget import COMPILED, diagnose, footprint

GPT2 = ["transformer.h.*.attn.c_attn", "transformer.h.*.mlp.*"]
LOSSES = {"stochastic_recon": 1.0, "stochastic_recon_layerwise": 1.0, "layerwise_sites": 2, "recon": 1.0, "faithfulness": 1.0}
CASES: dict[str, tuple[str, tuple[int, int], dict[str, Any]]] = {
    "induction-quick": ("induction-quick", (64, 64), {}),
    "induction, batch 128": ("induction", (128, 64), {}),
    "induction, batch 128, γ vector": ("induction", (128, 64), {"gamma": {"kind": "vector", "d_gate": 16}}),
    "facts-small": ("facts-small", (2, 9), {}),
    "GPT-2's shape, 2 × 9 tokens, C 64, d_gate 8": ("gpt2", (2, 9), {"C": 64, "gamma": {"kind": "vector", "d_gate": 8}}),
    "GPT-2's shape, 4 × 64 tokens, C 32, d_gate 4": ("gpt2", (4, 64), {"C": 32, "gamma": {"kind": "vector", "d_gate": 4}}),
}
"""Name → configuration or model, sequences and tokens of a batch, and fields."""


def main() -> None:
    print("| run | estimated, MiB | measured, MiB | ratio |\n|---|---:|---:|---:|")
    for name in CASES:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        estimated, measured = json.loads(done.stdout.splitlines()[-1])
        print(f"| {name} | {estimated / 2**20:.0f} | {measured / 2**20:.0f} | {estimated / measured:.2f} |", flush=True)


def one(name: str) -> tuple[int, int]:
    """Bytes estimated before the run, with all that the process holds by then, and the peak after two steps are made and saved."""
    base, (rows, length), fields = CASES[name]
    torch.manual_seed(0)
    model, vocabulary, fields = _model(base, fields)
    fields |= {"steps": 2, "threads": 1, "device": "cpu"}
    ids = torch.randint(vocabulary, (rows, length))
    inputs = ids if base.startswith("induction") else {"input_ids": ids, "use_cache": False}
    config = load_config("induction-quick").model_validate(fields)
    sites = find_sites(model, config.sites)
    size = footprint(model, sites, inputs)
    assert size is not None
    estimated = psutil.Process().memory_info().rss + diagnose(config, sites, size, libraries=COMPILED).bytes["total"]
    with tempfile.TemporaryDirectory() as folder:
        decompose(model, [inputs], out=Path(folder) / "run", **fields)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return estimated, next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _model(base: str, fields: dict[str, Any]) -> tuple[nn.Module, int, dict[str, Any]]:
    """A model of random weights, its vocabulary, and the fields of its run."""
    if base == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(GPT2Config()).eval(), 50257, {"sites": GPT2, "losses": LOSSES, **fields}
    config = load_config(base)
    own = config.model_dump(mode="json", include={"sites", "C", "gamma", "losses", "optim", "init", "last_token_only"})
    return config.task.network().eval(), config.task.skeleton(batch=1).vocabulary, own | fields


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(one(sys.argv[1])))
    else:
        main()
