"""Results as tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from paramlens.analysis.agreement import Agreement
    from paramlens.analysis.circuit import Circuit
    from paramlens.analysis.components import Inspection, Subcomponent
    from paramlens.analysis.edit import Selected
    from paramlens.analysis.effect import Suppression
    from paramlens.analysis.svd import SvdBaseline
    from paramlens.analysis.trace import Trace
    from paramlens.budget import Diagnosis
    from paramlens.verification import Verification


def print_circuit(result: "Circuit", console: Console) -> None:
    """Tables 1a and 1b as one table, 1c under it, and a word on silent sites."""
    table = Table(title=f"Active subcomponents (importance > {result.threshold:g}), {result.sequences} sequences", title_justify="left")
    many = len(result.roles) > _WIDE
    if many:
        table.padding = (0, 0, 0, 1)
    table.add_column("site", no_wrap=True)
    for role in result.roles:
        table.add_column(escape(role), justify="right", overflow="fold", min_width=3)
    table.add_column("unique", justify="right")
    for name, site in result.sites.items():
        cells = [f"{site.active[role]:.{1 if many else 3}f}" for role in result.roles]
        table.add_row(_short(name), *[cell if float(cell) >= 0.5 else f"[dim]{cell}[/dim]" for cell in cells], str(site.unique))
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


def print_inspection(result: "Inspection", console: Console) -> None:
    """One row a site, one column a token: how many subcomponents are active; and how many are the sentence's own."""
    table = Table(
        title=f"Active subcomponents (importance > {result.threshold:g}): {escape(result.prompt)}",
        title_justify="left",
        padding=(0, 0, 0, 1),
    )
    table.add_column("site", no_wrap=True, min_width=min(24, max(len(_short(site)) for site in result.by_site)))
    for token in result.tokens:
        table.add_column(escape(token.strip() or repr(token)), justify="right")
    table.add_column("own", justify="right")
    own = [site for site, _ in result.unique]
    for site, counts in result.by_site.items():
        table.add_row(_short(site), *[str(count) if count else "[dim]0[/dim]" for count in counts], str(own.count(site)))
    table.add_row("sum", *[str(sum(column)) for column in zip(*result.by_site.values(), strict=True)], str(len(own)))
    console.print(table)
    different = len({(each.site, each.subcomponent) for each in result.active})
    console.print(f"{different} of {result.total} are active in it, {len(own)} of them in no other sentence of the run", highlight=False)


def print_subcomponent(result: "Subcomponent", console: Console) -> None:
    """What it reads and writes, and where it is active."""
    title = f"{result.site}, subcomponent {result.subcomponent}: |u| {result.norm_u:.3g}, |v| {result.norm_v:.3g}"
    table = Table(title=title, title_justify="left", show_header=False)
    for name, entries in (
        ("reads tokens", result.reads),
        ("reads positions", result.positions),
        ("raises", result.writes),
        ("lowers", result.suppresses),
    ):
        listed = "  ".join(f"{escape(repr(each.what))} {each.value:+.2f}" for each in entries)
        table.add_row(name, listed or "[dim]not of the residual stream[/dim]")
    console.print(table)
    for tokens, importance, inner in zip(result.tokens, result.importance, result.inner, strict=True):
        strip = Table(show_header=True, box=None, padding=(0, 1, 0, 0))
        strip.add_column("")
        for token in tokens:
            strip.add_column(escape(token.strip() or repr(token)), justify="right")
        strip.add_row("importance", *[f"{value:.2f}" for value in importance])
        strip.add_row("inner", *[f"{value:+.2f}" for value in inner])
        console.print(strip)


def print_selected(selected: "Sequence[Selected]", console: Console) -> None:
    """The subcomponents an edit takes out."""
    table = Table(title=f"{len(selected)} subcomponents taken out", title_justify="left")
    for name in ("site", "subcomponent", "token", "importance", "adds, nats"):
        table.add_column(name, justify="left" if name in ("site", "token") else "right")
    for each in selected[:_LISTED]:
        numbers = [_figure(each.importance, 3), _figure(each.contribution, 3)]
        table.add_row(_short(each.site), str(each.subcomponent), escape((each.token or "-").strip()), *numbers)
    if len(selected) > _LISTED:
        table.add_row(f"and {len(selected) - _LISTED} more", "", "", "", "")
    console.print(table)


def print_suppression(result: "Suppression", console: Console) -> None:
    """What was taken out, and by kind of fact the share of its probability that an answer keeps, beside the controls."""
    print_selected(result.selected, console)
    title = f"Probability kept, median by kind ({result.method}): {escape(result.target)}"
    effects = {"these parts": result.effect} | {name.replace("subcomponents", "parts"): each for name, each in result.controls.items()}
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    table.add_column("kind of fact", no_wrap=True)
    for name in effects:
        table.add_column(name, justify="right", min_width=10)
    for kind in result.effect.kept:
        table.add_row(kind, *[f"{effect.kept[kind]:.3f}" for effect in effects.values()])
    table.add_section()
    table.add_row("perplexity", *[_figure(effect.perplexity, 2) for effect in effects.values()])
    console.print(table)
    console.print(f"perplexity before: {_figure(result.perplexity_before, 2)}", highlight=False)


def print_trace(result: "Trace", console: Console, *, zero_mlp: bool) -> None:
    """The three maps, one row a block, one column a token."""
    console.print(
        f"p({result.answer}) {result.clean:.3f}, with the subject corrupted {result.corrupted:.3f} "
        f"({result.samples} draws, noise {result.noise:g}, seed {result.seed})",
        highlight=False,
    )
    for name, values in (("hidden state", result.hidden), ("MLP", result.mlp), ("attention", result.attention)):
        window = "" if name == "hidden state" else f", {result.window} blocks together"
        table = Table(title=f"{name} restored at one place{window}: probability of the answer", title_justify="left")
        table.add_column("block")
        for i, token in enumerate(result.positions):
            table.add_column(escape(token.strip() or repr(token)) + ("*" if i in result.subject_positions else ""), justify="right")
        for block, row in enumerate(values):
            table.add_row(str(block), *[f"{value:.3f}" for value in row])
        console.print(table)
    if zero_mlp:
        console.print(f"One MLP put to zero: probability of the answer ({result.clean:.3f} with all)", highlight=False)
        table = Table()
        for block in range(len(result.zero_mlp)):
            table.add_column(str(block), justify="right")
        table.add_row(*[f"{value:.3f}" for value in result.zero_mlp])
        console.print(table)


_WIDE = 6
"""Roles that fit beside each other with three places each."""


def _short(site: str) -> str:
    """A site's name without what all Hugging Face models begin with."""
    return site.removeprefix("transformer.").removeprefix("model.").removeprefix("gpt_neox.")


_LISTED = 12
"""Subcomponents listed one by one."""


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


def print_verification(found: "Verification", console: Console) -> None:
    """One line for the run, one for each checkpoint, each with what is wrong."""

    def line(name: str, problems: Sequence[str]) -> None:
        state = "damaged" if problems else "whole"
        console.print(f"{name}: {state}", style="red" if problems else "green", highlight=False, markup=False, soft_wrap=True)
        for problem in problems:
            console.print(f"  {problem}", highlight=False, markup=False, soft_wrap=True)

    line(f"{found.run}, {found.status or 'status unknown'}", found.problems)
    for each in found.checkpoints:
        line(f"checkpoint of step {each.step}", each.problems)
    if not found.checkpoints:
        console.print("no checkpoint yet", style="yellow")
    if not found.resumable:
        console.print("a copy for reading: it has no optimizer and generators, and cannot be resumed", highlight=False)
