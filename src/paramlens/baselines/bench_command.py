"""The command `bench`, which measures speed. It loads torch only when it runs."""

from paramlens.config.file import parse_value
from paramlens.display.outcome import Outcome
from paramlens.display.streams import ErrorConsole


def bench(
    *,
    grid: str = "like-for-like",
    importance: str | None = None,
    length: int | None = None,
    batch: int | None = None,
    C: int | None = None,
    sites: int | None = None,
    layerwise_sites: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    matmul: str = "fp32",
    compile_: bool = False,
    cuda_graph: bool = False,
    repeats: int = 7,
    seconds: float = 60.0,
    skip_naive: bool = False,
    skip_busy: bool = False,
    skip_memory: bool = False,
) -> Outcome:
    """Measure steps per second and compare with the same step written the obvious way, alternating in one process.

    Args:
        grid: Cases to measure: like-for-like, table2, C, length, batch or sites.
        importance: Measure only this kind of γ: scalar, vector or attention.
        length: Tokens per sequence.
        batch: Sequences per step.
        C: Subcomponents per site.
        sites: Number of sites, three per block.
        layerwise_sites: Number of sites that the layerwise loss replaces in a step, or all.
        threads: Number of CPU threads.
        device: cpu or cuda.
        matmul: Precision of matrix products: fp32, tf32 or bf16.
        compile_: Use torch.compile.
        cuda_graph: Capture the step as one CUDA graph.
        repeats: Maximum number of steps of each kind per case.
        seconds: Seconds after which a case stops repeating.
        skip_naive: Measure the library alone.
        skip_busy: Do not measure beside a busy process.
        skip_memory: Do not measure peak memory.
    """
    from paramlens.baselines import bench as measure

    axes = {"importance": importance, "length": length, "batch": batch, "C": C, "sites": sites}
    axes |= {"layerwise_sites": layerwise_sites, "threads": threads}
    fixed = {name: parse_value(str(value)) for name, value in axes.items() if value is not None}
    cases = measure.cases(grid, **fixed, device=device, matmul=matmul, compile=compile_, cuda_graph=cuda_graph)
    skipped = {"naive": not skip_naive, "busy": not skip_busy, "memory": not skip_memory}
    measured = []
    for each in measure.bench(cases, repeats=repeats, seconds=seconds, **skipped):
        measured.append(each)
        done = f"{each.importance} length {each.length} batch {each.batch} C {each.C} sites {each.sites}: {each.steps_per_s:.2f} steps/s"
        ErrorConsole().print(done, highlight=False, markup=False)
    document = measure.document(measured)
    return Outcome(document, [measure.bench_table(document)])
