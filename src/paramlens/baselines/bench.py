"""Steps per second of the training step and of the same step written the obvious way, alternating in one process (`paramlens bench`)."""

import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from paramlens.baselines.naive import HIDDEN, NaiveStep
from paramlens.config.file import make_config
from paramlens.config.model import Config
from paramlens.display.tables import Column, Table, figure, row
from paramlens.errors import ConfigError
from paramlens.kernels.machine import machine
from paramlens.kernels.resources import free_memory
from paramlens.method.batch import Batch
from paramlens.method.decomposition import Decomposition
from paramlens.method.generators import generator
from paramlens.method.importance.kind import kind_class
from paramlens.method.importance.network import Importance
from paramlens.method.sites import find_sites
from paramlens.method.start import initialise, subcomponents
from paramlens.method.step import Steps
from paramlens.method.task import Task
from paramlens.runs.target_training import require_device
from paramlens.runs.train import make_optimizer
from paramlens.tasks.base import Target

GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "like-for-like": {"importance": ("scalar", "vector", "attention"), "threads": (1, 2)},
    "table2": {"importance": ("scalar", "vector", "attention"), "shape": ((16, 64), (64, 64), (1024, 64), (10240, 4))},
    "C": {"importance": ("scalar", "vector", "attention"), "C": (25, 50, 100, 200, 400)},
    "length": {"importance": ("scalar", "vector", "attention"), "shape": ((16, 64), (32, 64), (64, 64), (128, 64), (256, 64))},
    "batch": {"importance": ("vector",), "shape": ((64, 16), (64, 32), (64, 64), (64, 128), (64, 256))},
    "sites": {"importance": ("vector",), "sites": (3, 6, 12, 24), "layerwise_sites": ("all", 2)},
}
"""Grid → field of `Case` (`shape`: length and batch) → the values to try; all combinations are measured."""

D_GATE, VOCABULARY, WIDTH = 16, 128, 16
NAIVE_SHARE = 0.7
"""The naive step is left out if it is expected to need more than this share of the free memory."""


@dataclass(frozen=True)
class Case:
    """One case to measure: the induction target at Table 3's width, KL at all positions, Table 4's losses, fp32 weights."""

    importance: str = "vector"
    length: int = 64
    batch: int = 64
    C: int = 100
    sites: int = 6
    layerwise_sites: int | Literal["all"] = "all"
    threads: int | None = None
    device: str = "cpu"
    compile: bool = False
    cuda_graph: bool = False
    matmul: Literal["fp32", "tf32", "bf16"] = "fp32"

    def config(self) -> Config:
        if self.sites % 3:
            raise ConfigError(f"sites {self.sites}: the target has three a block (q, k, v); give a multiple of 3")
        losses = {"stochastic_recon": 1.0, "stochastic_recon_layerwise": 1.0, "recon": 0.5, "faithfulness": 1000.0, "minimality": 0.02}
        own = ("batch", "C", "threads", "device", "compile", "cuda_graph", "matmul")
        tree = {
            "name": "bench",
            "sites": ["blocks.*.attn.[qkv]"],
            "task": {"kind": "induction", "vocabulary": VOCABULARY, "length": self.length, "width": WIDTH, "blocks": self.sites // 3},
            "gamma": {"kind": self.importance, "d_gate": D_GATE},
            "losses": losses | {"layerwise_sites": self.layerwise_sites},
        }
        return make_config(tree | {name: getattr(self, name) for name in own}, source="bench")


@dataclass(frozen=True)
class Measured(Case):
    """A case and its results: medians over `repeats` steps, and peak memory of a step in bytes. None: not measured."""

    repeats: int = 0
    naive_steps_per_s: float | None = None
    steps_per_s: float = 0.0
    busy_steps_per_s: float | None = None
    """Steps per second of our step while another process keeps one core busy."""
    ratio: float | None = None
    naive_peak_bytes: int | None = None
    peak_bytes: int | None = None
    naive_left_out: str | None = None


def cases(grid: str, **fixed: Any) -> list[Case]:
    """Every case of a named grid; `fixed` fields replace the grid's own."""
    if grid not in GRIDS:
        raise ConfigError(f"grid {grid}: there are {', '.join(GRIDS)}")
    axes = {name: values for name, values in GRIDS[grid].items() if name not in fixed}
    found = []
    for values in product(*axes.values()):
        fields = dict(zip(axes, values, strict=True)) | fixed
        if "shape" in fields:
            length, batch = fields.pop("shape")
            fields = {"length": length, "batch": batch} | fields
        found.append(Case(**fields))
    return found


def bench(
    chosen: Sequence[Case], *, repeats: int = 7, seconds: float = 60.0, naive: bool = True, busy: bool = True, memory: bool = True
) -> Iterator[Measured]:
    """Measure each case: at most `repeats` steps of each kind, fewer once a case has taken `seconds`, but at least 3.

    naive: measure the naive step too; busy: measure ours again beside a busy process; memory: measure the peak memory of each, in a
    separate process. Raises `ConfigError` before the first measurement if one of the cases is impossible.
    """
    if repeats < 1 or not seconds > 0:
        raise ConfigError(f"repeats {repeats}, seconds {seconds:g}: give 1 or more repeats, and seconds above 0")
    for case in chosen:
        require_device(case.config().device)
    for case in chosen:
        left_out = _left_out(case) if naive else "not asked for"
        timed = _alternate(case, naive=left_out is None, busy=busy, repeats=repeats, seconds=seconds)
        ours = peak(case.config(), "ours") if memory else None
        theirs = peak(case.config(), "naive") if memory and left_out is None else None
        yield replace(timed, naive_left_out=left_out, peak_bytes=ours, naive_peak_bytes=theirs)


def document(measured: Sequence[Measured]) -> dict[str, Any]:
    """The document that `bench --json` prints."""
    device = torch.cuda.get_device_name() if any(each.device.startswith("cuda") for each in measured) else _processor()
    return {"machine": device, "torch": torch.__version__, "cases": [asdict(each) for each in measured]}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def bench_table(document: Mapping[str, Any]) -> Table:
    """One row per case: sizes, steps per second of both steps, their ratio, ours beside a busy process, peak memory of both in MiB."""
    heads = ("γ", "length", "batch", "C", "sites", "alone", "threads", "naive", "ours", "ratio", "busy", "MiB", "MiB")
    rows = []
    for case in document["cases"]:
        sizes = [str(case[name]) for name in ("importance", "length", "batch", "C", "sites", "layerwise_sites", "threads")]
        rates = [
            figure(case["naive_steps_per_s"], 3),
            figure(case["steps_per_s"], 3),
            figure(case["ratio"], 2),
            figure(case["busy_steps_per_s"], 3),
        ]
        peaks = [figure(None if case[name] is None else case[name] / 2**20, 0) for name in ("naive_peak_bytes", "peak_bytes")]
        rows.append(row(*sizes, *rates, *peaks))
    title = (
        f"{document['machine']}, torch {document['torch']}: steps/s of the naive step, ours, ours beside a busy process; peak MiB of both"
    )
    return Table(title, tuple(Column(name, right=name != "γ") for name in heads), tuple(rows), keys=7)


def _alternate(case: Case, *, naive: bool, busy: bool, repeats: int, seconds: float) -> Measured:
    config = case.config()
    with machine(config):
        steps = {"ours": training(config, "ours")} | ({"naive": training(config, "naive")} if naive else {})
        times = _times(case, steps, repeats=repeats, seconds=seconds)
        if busy:
            with busy_process():
                times["busy"] = _times(case, {"busy": steps["ours"]}, repeats=repeats, seconds=seconds)["busy"]
        threads = torch.get_num_threads()
    rates = {side: 1 / statistics.median(taken) for side, taken in times.items()}
    return Measured(
        **asdict(replace(case, threads=threads)),
        repeats=len(times["ours"]),
        steps_per_s=rates["ours"],
        busy_steps_per_s=rates.get("busy"),
        naive_steps_per_s=rates.get("naive"),
        ratio=rates["ours"] / rates["naive"] if naive else None,
    )


def _times(case: Case, steps: Mapping[str, Callable[[int], Any]], *, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Seconds taken by each step; the sides alternate."""
    times: dict[str, list[float]] = {side: [] for side in steps}
    warm = 5 if case.cuda_graph else 1
    began = time.perf_counter()
    for i in range(repeats + warm):
        for side, step in steps.items():
            start = time.perf_counter()
            step(i)
            if case.device.startswith("cuda"):
                torch.cuda.synchronize()
            if i >= warm:
                times[side].append(time.perf_counter() - start)
        if i >= warm + 2 and time.perf_counter() - began > seconds:
            break
    return times


@contextmanager
def busy_process() -> Iterator[None]:
    """Keep another process computing without a pause while active. It always ends with this process, also after a crash."""
    code = (
        "import os, threading; print(flush=True); threading.Thread(target=lambda: os._exit(len(os.read(0, 1))), daemon=True).start()\n"
        "while True: pass"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def beginning(config: Config, model: nn.Module | None = None) -> tuple[Task, Decomposition, Importance]:
    """The task, and the first U, V and γ of its decomposition. model: the target. Defaults to a toy target that is not trained."""
    torch.manual_seed(0)
    model = (config.task.network() if model is None else model).to(config.device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    task = config.task.make(Target(model.eval()), seed=0, batch=config.batch)
    sites = find_sites(model, config.sites)
    C = subcomponents(config.C, sites)
    decomposition = Decomposition(model, sites, C=C)
    importance = Importance({site.name: (site.d_seen, C) for site in sites}, config.gamma, max_length=config.task.longest)
    initialise(decomposition, config.init, generator=generator(0, "init"))
    importance.initialise(generator(0, "gamma"))
    return task, decomposition, importance.to(config.device)


def training(config: Config, side: Literal["ours", "naive"]) -> Callable[[int], Any]:
    """A function that takes an index and does one training step, with the update, on that batch. The toy target is not trained."""
    longest = config.task.longest
    assert longest is not None
    task, decomposition, importance = beginning(config)

    def batch(i: int) -> Batch:
        return task.batch(i, "train").to(config.device)

    if side == "ours":
        decomposition.find_blocks(batch(0).inputs)
        steps = Steps(config, task, decomposition, importance, make_optimizer(config, decomposition, importance))
        return lambda i: steps(batch(i), i)
    naive = NaiveStep(config, decomposition, importance, max_length=longest)
    optimizer = torch.optim.Adam(naive.parameters(), lr=config.optim.lr)
    names, alone = decomposition.names, config.losses.layerwise_sites
    rng = torch.Generator(device=config.device).manual_seed(0)

    def obvious(i: int) -> None:
        layerwise = names if alone == "all" else tuple(random.Random(i).sample(names, alone))
        loss = naive(batch(i).inputs, i, lambda _loss, _site, g: torch.rand(g.shape, generator=rng, device=g.device), layerwise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return obvious


def _left_out(case: Case) -> str | None:
    """Why the naive step is left out: it lacks this kind of γ, or its autograd memory would not fit. None: it is measured."""
    if case.importance not in HIDDEN:
        return f"has no {case.importance} γ"
    rows, plans = case.batch * case.length, 2 + (case.sites if case.layerwise_sites == "all" else case.layerwise_sites)
    hidden = 4 * rows * case.sites * case.C * D_GATE
    scores = 4 * case.sites * case.batch * case.length**2 if kind_class(case.importance).has_table else 0
    runs = plans * rows * (4 * VOCABULARY + 8 * case.sites * WIDTH) + 3 * rows * case.C * 3 * case.sites
    needed = 4 * (hidden + scores + runs)
    free = free_memory(case.device)
    return f"needs about {needed / 2**30:.0f} GiB" if free is not None and needed > NAIVE_SHARE * free else None


def peak(config: Config, side: Literal["ours", "naive"]) -> int | None:
    """Peak memory of a step, in bytes above the level before it; on CPUs, in a separate process. None: not Linux, so not known."""
    if config.device.startswith("cuda"):
        step = training(config, side)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(0)
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (config, side))


def _peak_here(config: Config, side: Literal["ours", "naive"]) -> int:
    with machine(config):
        training(config.model_copy(update={"batch": 1, "C": 4}), side)(0)  # load and compile what a step needs
        step = training(config, side)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak to what is resident now
        before = _resident("VmRSS")
        step(0)
        step(1)
        return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
