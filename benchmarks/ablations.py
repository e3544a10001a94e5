"""What each optimisation of the step is worth: the like-for-like step (vector γ) with one of them removed, alternating in one process.

python benchmarks/ablations.py [THREADS]        # Markdown; about 3 minutes
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

from paramlens.baselines import bench
from paramlens.kernels import mlps, native
from paramlens.kernels.machine import machine
from paramlens.method.decomposition import Decomposition
from paramlens.method.losses import reconstruction
from paramlens.tasks.induction.model import InductionTransformer

REPEATS = 9


@contextmanager
def hooked() -> Iterator[None]:
    """A hook on every attention pattern, so that the toy computes it as explicit products and a softmax."""
    made = []
    before = InductionTransformer.forward

    def forward(self: InductionTransformer, *args: Any, **kwargs: Any) -> torch.Tensor:
        patterns = [block.get_submodule("attn.pattern") for block in self.blocks]
        if not any(pattern._forward_hooks for pattern in patterns):
            made.extend(pattern.register_forward_hook(lambda *_: None) for pattern in patterns)
        return before(self, *args, **kwargs)

    with patch.object(InductionTransformer, "forward", forward):
        yield
    for hook in made:
        hook.remove()


def cached(factor: float) -> Any:
    size = native.cached_numbers()
    return patch.object(native, "cached_numbers", lambda: int(size * factor))


def plain() -> Any:
    return patch.object(native, "serves", lambda *_: False)


VARIANTS: dict[str, Callable[[], Any]] = {
    "as shipped": nullcontext,
    "no compiled loops: the same in plain PyTorch, γ in chunks": plain,
    "every plan through every block": lambda: patch.object(Decomposition, "find_blocks", lambda *_: None),
    "all plans in one pass": lambda: patch.object(reconstruction, "CPU_STACK", 2**40),
    "one plan per pass": lambda: patch.object(reconstruction, "CPU_STACK", 1),
    "chunks of a quarter of the cache": lambda: cached(1 / 4),
    "chunks of four caches": lambda: cached(4),
    "γ's hidden units in one chunk": lambda: patch.object(mlps, "MIN_CHUNK", 2**30),
    "the toy's attention pattern computed explicitly": hooked,
    "Adam not fused": lambda: patch("paramlens.runs.train.torch.optim.Adam", unfused),
}

_Adam = torch.optim.Adam


def unfused(*args: Any, **kwargs: Any) -> torch.optim.Adam:
    return _Adam(*args, **kwargs | {"fused": False})


def main(threads: int) -> None:
    case = bench.Case(threads=threads)
    with machine(case.config()):
        steps: dict[str, tuple[Callable[[], Any], Callable[[int], Any]]] = {}
        for name, context in VARIANTS.items():
            with context():
                steps[name] = context, bench.training(case.config(), "ours")
                steps[name][1](0)
        alone = bench.Case(threads=threads, layerwise_sites=1)
        steps["layerwise_sites 1 (another estimate of the same loss)"] = nullcontext, bench.training(alone.config(), "ours")
        steps["naive"] = nullcontext, bench.training(case.config(), "naive")
        times: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(REPEATS):
            for name, (context, step) in steps.items():
                with context():
                    start = time.perf_counter()
                    step(i)
                    times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    print(f"{threads} threads, {bench._processor()}\n\n| step | ms | times as shipped |\n|---|---:|---:|")
    for name, taken in medians.items():
        print(f"| {name} | {taken * 1e3:.0f} | {taken / medians['as shipped']:.2f} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
