"""The measurements of docs/performance.md: every grid of `paramlens bench`, the machine's floor, growth exponents and their picture.

python benchmarks/performance.py measure        # about 25 minutes on 2 idle cores; docs/results/performance.json
python benchmarks/performance.py tables         # Markdown from that file
python benchmarks/performance.py threads        # two threads beside a busy process
python benchmarks/performance.py picture        # docs/images/growth.png, by headless Chromium
"""

import json
import math
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from paramlens.baselines import bench
from paramlens.baselines.bench import D_GATE, WIDTH
from paramlens.kernels.machine import machine
from paramlens.method.decomposition import Decomposition
from paramlens.method.importance.network import Importance
from paramlens.method.losses import divergence
from paramlens.method.losses.minimality import minimality

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "performance.json"
KEPT = ("like-for-like", "table2", "C", "length", "batch", "sites")
VARIED = {"C": "C", "length": "length", "batch": "batch", "sites": "sites"}


def measure() -> None:
    """All grids; growth at one thread, so that what else the machine does weighs least."""
    grids: dict[str, object] = {}
    document: dict[str, Any] = {}
    for grid in KEPT:
        fixed = {} if grid in ("like-for-like", "table2") else {"threads": 1}
        measured = []
        repeats = {"like-for-like": 11, "table2": 3}.get(grid, 5)
        extras = dict.fromkeys(("busy", "memory"), grid == "like-for-like")
        for each in bench.bench(bench.cases(grid, **fixed), repeats=repeats, seconds=12, **extras):
            measured.append(each)
            print(grid, each.importance, each.length, each.batch, each.C, each.sites, each.steps_per_s, each.ratio, flush=True)
        document = bench.document(measured)
        grids[grid] = document["cases"]
    RESULTS.write_text(
        json.dumps({"machine": document["machine"], "torch": document["torch"], "floor": floor(), "grids": grids}, indent=1) + "\n"
    )


def floor() -> dict[str, float]:
    """What one core of this machine can do at best: products of γ's shape, a pass of exact GELU in cache, memory bandwidth."""
    torch.set_num_threads(1)
    rows = 327
    w, x, z = torch.randn(100 * D_GATE, WIDTH), torch.randn(rows, WIDTH), torch.empty(100 * D_GATE, rows)
    big, other = torch.ones(2**26), torch.ones(2**26)
    flops = 2 * w.numel() * rows
    return {
        "product_gflops": flops / best(lambda: torch.mm(w, x.T, out=z)) / 1e9,
        "square_product_gflops": 2 * 512**3 / best(lambda: torch.mm(other[: 2**18].view(512, 512), big[: 2**18].view(512, 512))) / 1e9,
        "gelu_ns": best(lambda: torch.nn.functional.gelu(z)) / z.numel() * 1e9,
        "copy_gb_per_s": 2 * big.numel() * 4 / best(lambda: big.copy_(other)) / 1e9,
    }


def best(function, repeats: int = 30) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Slope of log time over log size, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(each) for each in seconds]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def curves(document: dict) -> list[dict]:
    """One entry per grid, γ kind and way of layerwise: sizes, seconds a step of both, exponents."""
    found = []
    for grid, axis in VARIED.items():
        groups: dict[tuple[str, object], list[dict]] = {}
        for case in document["grids"][grid]:
            groups.setdefault((case["importance"], case["layerwise_sites"]), []).append(case)
        for (kind, alone), cases in groups.items():
            sizes = [case[axis] for case in cases]
            ours = [1 / case["steps_per_s"] for case in cases]
            naive = [None if case["naive_steps_per_s"] is None else 1 / case["naive_steps_per_s"] for case in cases]
            entry = {"grid": grid, "importance": kind, "alone": alone, "sizes": sizes, "ours": ours, "naive": naive}
            entry["exponent"] = exponent(sizes, ours)
            entry["naive_exponent"] = exponent(sizes, [each for each in naive if each is not None]) if None not in naive else None
            found.append(entry)
    return found


def tables() -> None:
    document = json.loads(RESULTS.read_text())
    print(f"Machine: {document['machine']}, torch {document['torch']}. Floor: {document['floor']}\n")
    for grid in ("like-for-like", "table2"):
        print(f"### {grid}\n")
        print("| γ | length | batch | threads | naive steps/s | ours steps/s | ratio | naive peak MiB | ours peak MiB |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
        for case in document["grids"][grid]:
            figures = [figure(case[key], places) for key, places in (("naive_steps_per_s", 3), ("steps_per_s", 3), ("ratio", 2))]
            peaks = [figure(case[key] and case[key] / 2**20, 0) for key in ("naive_peak_bytes", "peak_bytes")]
            print(f"| {case['importance']} | {case['length']} | {case['batch']} | {case['threads']} | {' | '.join(figures + peaks)} |")
        print()
    print("| grows with | γ | layerwise_sites | from, to | exponent | naive exponent | s per step at the largest | ratio there |")
    print("|---|---|---|---|---:|---:|---:|---:|")
    for curve in curves(document):
        last = curve["naive"][-1] / curve["ours"][-1] if curve["naive"][-1] else None
        span = f"{curve['sizes'][0]}, {curve['sizes'][-1]}"
        names = f"{curve['grid']} | {curve['importance']} | {curve['alone']} | {span}"
        figures = [figure(curve["exponent"], 2), figure(curve["naive_exponent"], 2), figure(curve["ours"][-1], 3), figure(last, 2)]
        print(f"| {names} | {' | '.join(figures)} |")


def figure(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def parts() -> None:
    """Clocks around the parts of the like-for-like step with vector γ; what is left is the backward pass through γ, and loose ends."""
    timed = {
        "the target's run": (Decomposition, "target_run"),
        "γ forward": (Importance, "forward"),
        "masked runs, forward": (Decomposition, "forward"),
        "divergences": (divergence, "kl_divergence"),
        "gradients of the masked runs, to U, V and g": (torch.Tensor, "backward"),
        "minimality": (minimality, "minimality"),
        "all gradients, those of the masked runs, of γ and of minimality": (torch.autograd, "backward"),
        "Adam": (torch.optim.Adam, "step"),
    }
    columns = {}
    for threads in (1, 2):
        case = bench.Case(threads=threads)
        taken: dict[str, list[float]] = {name: [] for name in timed}
        total: list[float] = []
        with machine(case.config()), ExitStack() as stack:
            once = bench.training(case.config(), "ours")
            once(0)
            for name, (owner, attribute) in timed.items():
                stack.enter_context(patch.object(owner, attribute, clocked(getattr(owner, attribute), taken[name])))
            calls = {}
            for i in range(16):
                before = {name: len(times) for name, times in taken.items()}
                start = time.perf_counter()
                once(i)
                total.append(time.perf_counter() - start)
                for name, times in taken.items():
                    calls.setdefault(name, []).append(sum(times[before[name] :]))
        columns[threads] = {name: statistics.median(each) for name, each in calls.items()} | {"whole step": statistics.median(total)}
    print("| part | ms, 1 thread | share | ms, 2 threads |\n|---|---:|---:|---:|")
    for name, one in columns[1].items():
        print(f"| {name} | {one * 1e3:.1f} | {one / columns[1]['whole step']:.0%} | {columns[2][name] * 1e3:.1f} |")


def threads() -> None:
    """Seconds a step, on the clock and of processor time, on one and on two threads, alternating beside a busy process: medians of 40."""
    configs = {count: bench.Case(length=16, threads=count).config() for count in (1, 2)}
    steps = {count: bench.training(config, "ours") for count, config in configs.items()}
    times: dict[int, list[tuple[float, float]]] = {count: [] for count in configs}
    with bench.busy_process():
        for i in range(41):
            for count, config in configs.items():
                with machine(config):
                    start, used = time.perf_counter(), time.process_time()
                    steps[count](i)
                    times[count].append((time.perf_counter() - start, time.process_time() - used))
    for count, taken in times.items():
        clock, processor = (statistics.median(each) for each in zip(*taken[1:], strict=True))
        print(f"{count} threads: {clock:.3f} s, {processor:.3f} s of processor time")


def clocked(function, times: list[float]):
    """The function, its time noted; nested calls of the same one would count twice, and there are none."""

    def run(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            times.append(time.perf_counter() - start)

    return run


def picture() -> None:
    import plotly.graph_objects as go
    from picture import save_figure
    from plotly.subplots import make_subplots

    titles = {"C": "subcomponents C", "length": "length (attention γ is quadratic)", "batch": "batch", "sites": "sites"}
    drawn = make_subplots(rows=2, cols=2, subplot_titles=list(titles.values()), vertical_spacing=0.16)
    colours = {"scalar": "#0072B2", "vector": "#D55E00", "attention": "#009E73"}
    named: set[str] = set()
    for curve in curves(json.loads(RESULTS.read_text())):
        place = list(titles).index(curve["grid"])
        alone = "" if curve["alone"] == "all" else f", {curve['alone']} sites alone"
        for side, dash in (("ours", "solid"), ("naive", "dot")):
            if None in curve[side]:
                continue
            name = f"{curve['importance']}{alone}, {side}"
            drawn.add_trace(
                go.Scatter(
                    x=curve["sizes"],
                    y=curve[side],
                    name=name,
                    showlegend=name not in named,
                    mode="lines+markers",
                    line={"dash": "dashdot" if alone and side == "ours" else dash, "color": colours[curve["importance"]]},
                ),
                row=place // 2 + 1,
                col=place % 2 + 1,
            )
            named.add(name)
    drawn.update_xaxes(type="log", dtick=math.log10(2))
    drawn.update_yaxes(type="log", title="seconds a step")
    save_figure(drawn, ROOT / "docs" / "images" / "growth.png", width=1000, height=760)


if __name__ == "__main__":
    {"measure": measure, "tables": tables, "parts": parts, "threads": threads, "picture": picture}[sys.argv[1]]()
