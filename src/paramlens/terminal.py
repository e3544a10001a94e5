"""Results as tables for the terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from paramlens.analysis.agreement import Agreement
    from paramlens.analysis.circuit import Circuit
    from paramlens.analysis.doctor import Diagnosis
    from paramlens.analysis.svd import SvdBaseline


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
    if any(change.attention or change.accuracy is not None for change in result.interventions):
        console.print(_interventions(result))
    for name, site in result.sites.items():
        if site.silent:
            console.print(f"{name} is silent: it {site.silent}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _interventions(result: "Circuit") -> Table:
    links = list(result.interventions[0].attention)
    table = Table(title="Without and with a site's active subcomponents alone, and other changes (§6.1)", title_justify="left")
    for name in ("change", "KL, nats", "accuracy", *(link.replace("_", " ") for link in links)):
        first = name == "change"
        table.add_column(name, justify="left" if first else "right", no_wrap=first, min_width=None if first else 8)
    for change in result.interventions:
        accuracy = "-" if change.accuracy is None else f"{change.accuracy:.4f}"
        table.add_row(change.name, f"{change.kl:.2e}", accuracy, *[f"{change.attention[link]:.3f}" for link in links])
    return table


def print_svd(result: "SvdBaseline", console: Console) -> None:
    """Ranks at the tolerance beside the decomposition's counts, and both curves at a few points."""
    ours = result.counted
    title = f"SVD pruned to KL {result.kl:.2e} (tolerance {result.tolerance:.2e}) nats beside the decomposition's {result.recon:.2e}"
    table = Table(title=title, title_justify="left")
    for name in ("site", "SVD rank", "active at its role", "unique"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for site, rank in result.ranks.items():
        table.add_row(site, str(rank), f"{ours.active[site]:.3f}", str(ours.unique[site]))
    table.add_row("sum", str(sum(result.ranks.values())), f"{sum(ours.active.values()):.3f}", str(sum(ours.unique.values())))
    console.print(table)
    factors = [(name, factor) for name, factor in (("active", result.factor_active), ("unique", result.factor_unique)) if factor]
    console.print("SVD keeps " + ", ".join(f"{factor:.1f} times as many as are {name}" for name, factor in factors), highlight=False)
    curve = Table(title="Rank 1 parts in all, and what is lost with them alone", title_justify="left")
    for name in ("KL up to, nats", "SVD", "active", "unique"):
        curve.add_column(name, justify="right")
    for tolerance in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        held = [point for point in result.decomposition if point.kl <= tolerance]
        fewest = min(held, key=lambda point: sum(point.active.values()), default=None)
        curve.add_row(
            f"{tolerance:.0e}",
            str(result.rank_at(tolerance)),
            f"{sum(fewest.active.values()):.1f}" if fewest else "-",
            str(sum(fewest.unique.values())) if fewest else "-",
        )
    console.print(curve)


def print_agreement(result: "Agreement", console: Console) -> None:
    """One row a site: agreement, and by direction and pattern alone, mean over the pairs of runs."""
    pairs = f"{len(result.pairs)} pair{'s' if len(result.pairs) > 1 else ''}"
    table = Table(title=f"Agreement of {len(result.runs)} runs, mean over {pairs}, in [0, 1]", title_justify="left")
    for name in ("site", "agreement", "direction", "by chance", "pattern", "parts"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for name, site in result.sites.items():
        numbers = (site.agreement, site.direction, site.chance, site.pattern)
        table.add_row(name, *[f"{number:.3f}" for number in numbers], f"{site.parts[0]:.1f}, {site.parts[1]:.1f}")
    console.print(table)
    if result.init == "svd":
        note = "every seed started from the same singular vectors, which flatters the agreement; --init.kind svd_rotated does not"
        console.print(note, style="yellow", highlight=False, soft_wrap=True)


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
