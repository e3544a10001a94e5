"""Results as tables for the terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from paramlens.analysis.circuit import Circuit
    from paramlens.analysis.doctor import Diagnosis


def print_circuit(result: "Circuit", console: Console) -> None:
    """Tables 1a and 1b as one table, 1c under it, and a word on silent sites."""
    table = Table(title=f"Active subcomponents (importance > {result.threshold:g}), {result.sequences} sequences", title_justify="left")
    table.add_column("site")
    for role in result.roles:
        table.add_column(role, justify="right")
    table.add_column("unique", justify="right")
    for name, site in result.sites.items():
        cells = [f"{site.active[role]:.3f}" for role in result.roles]
        table.add_row(name, *[cell if float(cell) >= 0.5 else f"[dim]{cell}[/dim]" for cell in cells], str(site.unique))
    console.print(table)
    metrics = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in result.metrics.items():
        metrics.add_row(name, f"{value:.4f}" if name.startswith("accuracy") else f"{value:.2e}")
    console.print(metrics)
    for name, site in result.sites.items():
        if site.silent:
            console.print(f"{name} is silent: it {site.silent}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def print_diagnosis(diagnosis: "Diagnosis", console: Console) -> None:
    """Parameters and bytes by part."""
    for title, parts, unit in (("parameters", diagnosis.parameters, 1), ("memory, MiB", diagnosis.bytes, 2**20)):
        table = Table(title=f"{title} ({diagnosis.sites} sites)", title_justify="left", show_header=False)
        for name, count in parts.items():
            table.add_row(name, f"{count:,}" if unit == 1 else f"{count / unit:,.1f}")
        console.print(table)


def bench_table(document: Mapping[str, Any]) -> Table:
    """One row a case: sizes, steps per second of both steps, their ratio, and peak memory of both in MiB."""
    title = f"{document['machine']}, torch {document['torch']}: steps/s of the naive step and ours, peak MiB of both"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("γ", "length", "batch", "C", "sites", "alone", "threads", "naive", "ours", "ratio", "MiB", "MiB"):
        table.add_column(name, justify="left" if name == "γ" else "right", no_wrap=True)
    for case in document["cases"]:
        sizes = [str(case[name]) for name in ("importance", "length", "batch", "C", "sites", "layerwise_sites", "threads")]
        rates = [_figure(case["naive_steps_per_s"], 3), _figure(case["steps_per_s"], 3), _figure(case["ratio"], 2)]
        peaks = [_figure(None if case[name] is None else case[name] / 2**20, 0) for name in ("naive_peak_bytes", "peak_bytes")]
        table.add_row(*sizes, *rates, *peaks)
    return table


def _figure(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:,.{places}f}"
