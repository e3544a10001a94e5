"""What docs/reliability.md shows: the fault matrix, exact resume, the same bytes twice, and what a save costs.

    python benchmarks/reliability.py matrix    every cell of tests/test_faults.py, and the picture of them
    python benchmarks/reliability.py resume    two configurations, stopped at five points each
    python benchmarks/reliability.py whole     the same at the configurations' shipped lengths, target and all (an hour)
    python benchmarks/reliability.py repeat    one command twice, three seeds
    python benchmarks/reliability.py cost      a save beside the bare write of the same tensors, alternating

Each writes its part of docs/results/reliability.json.
"""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from paramlens.files.plain import read_json
from paramlens.runs.checkpoint import write_checkpoint
from paramlens.runs.layout import checkpoint_path, checkpoint_step, checkpoints

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "reliability.json"
PICTURE = ROOT / "docs" / "images" / "faults.svg"

RUNS = {
    "induction-quick": ["--steps", "300", "--task.training.steps", "600", "--task.training.settle", "0", "--task.training.attempts", "1"],
    "facts-small": ["--steps", "60", "--task.miniature.steps", "60", "--threads", "1"],
}
"""Short, so that all of it takes minutes; resuming and repeating do not depend on how good a target is."""

WHOLE = {"induction-quick": ["--steps", "1500"], "facts-small": ["--steps", "1000", "--threads", "1"]}

POINTS = (0.1, 0.3, 0.5, 0.7, 0.9)


def keep(part: str, document: Any) -> None:
    """Write one part of the results, the others kept."""
    whole = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(whole | {part: document}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


def paramlens(*words: str) -> None:
    subprocess.run([sys.executable, "-c", "from paramlens.cli.main import entry; entry()", *words], check=True, stdout=subprocess.DEVNULL)


def hashes(path: Path) -> dict[str, str]:
    """Of every file of a run that should not depend on when or where it ran: all but run.json and the lock."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name not in ("run.json", ".lock")]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def difference(ours: Path, theirs: Path) -> float:
    """Largest difference over U, V, γ and the optimizer's moments of two checkpoints."""
    worst = 0.0
    for name in ("components", "importance", "optimizer"):
        a, b = (load_file(path / f"{name}.safetensors") for path in (ours, theirs))
        worst = max(worst, *((a[key].double() - b[key].double()).abs().max().item() for key in a))
    return worst


def resume(runs: Mapping[str, Sequence[str]] = RUNS, part: str = "resume") -> None:
    """Every run kept at five steps, then resumed from each in a new process, to the end."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for config, flags in runs.items():
            steps = int(flags[1])
            every = ["--checkpoint.every", str(steps // 10), "--checkpoint.keep_last", "20", *flags]
            undisturbed = Path(folder) / config
            paramlens("decompose", config, "--out", str(undisturbed), *every)
            for point in POINTS:
                path = Path(folder) / f"{config}-{point}"
                shutil.copytree(undisturbed, path)
                for later in [each for each in checkpoints(path) if checkpoint_step(each) > point * steps]:
                    shutil.rmtree(later)
                start = checkpoint_step(checkpoints(path)[-1])
                paramlens("decompose", config, "--resume", "--out", str(path), *every)
                ends = [checkpoint_path(each, steps) for each in (path, undisturbed)]
                same = hashes(path) == hashes(undisturbed)
                rows.append({"config": config, "from": start, "to": steps, "difference": difference(*ends), "same_bytes": same})
                print(rows[-1], flush=True)
                shutil.rmtree(path)
                keep(part, rows)


def whole() -> None:
    """`resume` at the shipped lengths."""
    resume(WHOLE, "whole")


def repeat() -> None:
    """The same command twice, target and all, in two processes; every file but run.json compared."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(3):
            paths = [Path(folder) / f"{seed}-{turn}" for turn in range(2)]
            for path in paths:
                paramlens("decompose", "induction-quick", "--seed", str(seed), "--out", str(path), *RUNS["induction-quick"])
            first, second = (hashes(path) for path in paths)
            rows.append({"config": "induction-quick", "seed": seed, "files": len(first), "same_bytes": first == second})
            print(rows[-1], flush=True)
    keep("repeat", rows)


def cost(repeats: int = 9) -> None:
    """A whole save, hashed, synced and renamed, beside the bare write of its tensors; and beside the steps of a run."""
    rows: list[dict[str, Any]] = []
    sizes = {"induction-quick": (9_000, 75_000), "facts-small": (1_050_000, 1_300_000), "a γ of 256 MiB": (1_000_000, 66_000_000)}
    for name, (factors, gamma) in sizes.items():
        tensors = {
            "components": {"U": torch.randn(factors)},
            "importance": {"gamma": torch.randn(gamma)},
            "optimizer": {"exp_avg": torch.randn(factors + gamma), "exp_avg_sq": torch.randn(factors + gamma)},
            "rng": {"torch": torch.get_rng_state()},
        }
        whole, bare, checks = list[float](), list[float](), list[float]()
        with tempfile.TemporaryDirectory(dir=ROOT) as folder:
            path = Path(folder)
            (path / "checkpoints").mkdir()
            for turn in range(repeats):
                began = time.perf_counter()
                for part, group in tensors.items():
                    save_file(group, path / f"{part}.safetensors")
                bare.append(time.perf_counter() - began)
                began = time.perf_counter()
                final = write_checkpoint(path, tensors, {"step": turn})
                whole.append(time.perf_counter() - began)
                began = time.perf_counter()
                for file in final.iterdir():
                    hashlib.sha256(file.read_bytes())
                checks.append(time.perf_counter() - began)
                shutil.rmtree(final)
        size = sum(value.numel() * value.element_size() for group in tensors.values() for value in group.values())
        medians = {"save_s": statistics.median(whole), "bare_s": statistics.median(bare), "check_s": statistics.median(checks)}
        rows.append({"of": name, "bytes": size, **medians, "ratio": medians["save_s"] / medians["bare_s"]})
    keep("cost", rows)


def matrix() -> None:
    """All cells, and the picture."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "matrix.json"
        words = ["-q", "-m", "", str(ROOT / "tests" / "test_faults.py"), "-p", "no:cacheprovider"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words], env=os.environ | {"PARAMLENS_MATRIX": str(file)}, cwd=ROOT, check=False
        )
        cells = read_json(file)["cells"]
    passed = sum(cell["passed"] for cell in cells)
    PICTURE.write_text(drawn(cells), encoding="utf-8")
    groups = {group: sum(cell["group"] == group for cell in cells) for group in dict.fromkeys(cell["group"] for cell in cells)}
    keep("matrix", {"cells": len(cells), "passed": passed, "groups": groups, "failed": [cell for cell in cells if not cell["passed"]]})
    sys.exit(done.returncode)


def drawn(cells: Sequence[dict[str, Any]]) -> str:
    """Every group as a grid, faults down, moments or files across; one row alone as a list."""
    parts: list[str] = []
    y, width = 30, 900
    passed = sum(cell["passed"] for cell in cells)
    parts.append(f'<text x="10" y="20" class="t">{passed} of {len(cells)} cells pass</text>')
    for group in dict.fromkeys(cell["group"] for cell in cells):
        own = [cell for cell in cells if cell["group"] == group]
        rows, columns = (list(dict.fromkeys(cell[key] for cell in own)) for key in ("row", "column"))
        y += 24
        parts.append(f'<text x="10" y="{y}" class="t">{escape(group)}: {sum(cell["passed"] for cell in own)} of {len(own)}</text>')
        if len(rows) == 1 and len(columns) > 20:
            for i, cell in enumerate(own):
                x, row = 10 + 295 * (i % 3), y + 10 + 17 * (i // 3)
                parts.append(f'{_square(x, row, passed=cell["passed"])}<text x="{x + 18}" y="{row + 10}">{escape(cell["column"])}</text>')
            y += 10 + 17 * -(-len(own) // 3)
            continue
        y += 8
        for i, column in enumerate(columns):
            parts.append(f'<text x="{220 + 18 * i + 18}" y="{y + 8 + 15 * i}">{escape(column)}</text>')
            parts.append(f'<path d="M{220 + 18 * i + 7} {y + 12 + 15 * len(columns)}V{y + 4 + 15 * i}h8"/>')
        y += 14 + 15 * len(columns)
        for row in rows:
            parts.append(f'<text x="214" y="{y + 10}" text-anchor="end">{escape(row)}</text>')
            for cell in own:
                if cell["row"] == row:
                    parts.append(_square(220 + 18 * columns.index(cell["column"]), y, passed=cell["passed"]))
            y += 18
    style = "text{font:11px system-ui,sans-serif;fill:#1c2430}.t{font-weight:600;font-size:13px}path{stroke:#9aa3af;fill:none}"
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 20}" viewBox="0 0 {width} {y + 20}">'
    return f'{frame}<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'


def _square(x: int, y: int, *, passed: bool) -> str:
    mark = "" if passed else f'<text x="{x + 4}" y="{y + 11}" style="fill:#fff">×</text>'
    return f'<rect x="{x}" y="{y}" width="14" height="14" rx="2" fill="{"#2f8f5b" if passed else "#b3261e"}"/>{mark}'


if __name__ == "__main__":
    commands = {"matrix": matrix, "resume": resume, "whole": whole, "repeat": repeat, "cost": cost}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    commands[sys.argv[1]]()
