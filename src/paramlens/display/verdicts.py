"""Verdicts on whether a decomposition can be trusted, in words and numbers; used by the page, the commands and Python."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from paramlens.display.tables import Cell, Column, Table, Tone

Standing = Literal["holds", "partly", "fails"]

NATS = (0.01, 0.1)
"""Maximum KL at which a verdict holds, and at which it partly holds; in nats per position of the loss."""

WEIGHTS = (1e-4, 1e-2)
"""The same for the share of the weights' squared norm that U V leaves out."""

ACCURACY = (0.005, 0.05)
"""The same for the share of right answers that is lost."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on one question: its name, its standing, its number and their meaning."""

    name: str
    standing: Standing
    figure: str
    text: str


def verdicts(
    metrics: Mapping[str, float],
    *,
    off_data: Mapping[str, Any] | None = None,
    target: Mapping[str, Any] | None = None,
    nothing_to_attack: str | None = None,
) -> Iterator[Verdict]:
    """The verdicts for the given metrics.

    metrics: of a circuit or an evaluation, by name.
    off_data: as in `circuit.json`. Defaults to None: not measured.
    target: as in `target.json`. Defaults to None: the target was not trained here.
    nothing_to_attack: as in `circuit.json`. Defaults to None: there was something, or nothing is known of it.
    """
    if target is not None and not target["converged"]:
        text = "The target had not converged when its training ended: what follows is the circuit of a half-trained model."
        yield Verdict("target", "fails", f"{target['checks'][-1]['accuracy']:.3f} right", text)
    if "remainder" in metrics:
        text = "‖W - U V‖ / ‖W‖: the remainder Δ = W - U V is a component, so that nothing of the weights is lost; with masks g it is off."
        yield Verdict("weights", _standing(0.0, WEIGHTS), f"Δ {_percent(metrics['remainder'])}", text)
    if "faithfulness_relative" in metrics:
        relative = metrics["faithfulness_relative"]
        text = f"Mean squared difference of W and U V, which leaves out {_percent(relative)} of the weights' squared norm."
        yield Verdict("weights", _standing(relative, WEIGHTS), f"{metrics['faithfulness']:.1e}", text)
    for metric, (name, text) in _DIVERGENCES.items():
        if metric in metrics:
            yield _kl(name, metrics[metric], text)
    if "accuracy_masked" in metrics:
        lost = metrics["accuracy_target"] - metrics["accuracy_masked"]
        text = f"Share of answers that the masked model gets right; the target gets {metrics['accuracy_target']:.4f}."
        yield Verdict("answers", _standing(lost, ACCURACY), f"{metrics['accuracy_masked']:.4f}", text)
    worst = [metrics[name] for name in ("recon_adversarial", "recon_worst") if name in metrics]
    if worst:
        text = "How far predictions move when inactive subcomponents are turned on by the worst masks that a search finds."
        if nothing_to_attack is not None:
            text = f"{text} Here {nothing_to_attack}."
        yield _kl("worst case", max(worst), text)
    if off_data is not None:
        yield _kl("off the data", off_data["recon"], _off_data(off_data))


_DIVERGENCES = {
    "recon": ("predictions", "How far predictions are from the target's when every subcomponent is scaled by its importance."),
    "recon_rounded": ("on or off", "How far they are with the active subcomponents fully on and all others off, as Table 1 counts them."),
}


def _off_data(found: Mapping[str, Any]) -> str:
    text = f"KL of the masked model on {found['what']}: other inputs than all other figures are measured on. "
    if found.get("with_remainder") is not None:
        text += f"With the remainder Δ on as well it is {found['with_remainder']:.2g} nats. "
    if found.get("parts") == 0:
        return f"{text}No subcomponent is active on its own data, so there is nothing to remove from the target."
    as_many = ", ".join(f"{name} {value:.2g}" for name, value in found["controls"].items())
    beside = f" (as many {as_many})" if as_many else ""
    return f"{text}Removing the subcomponents active on its own data moves the target there by {found['removed']:.2g} nats{beside}."


def verdict_table(found: Iterable[Verdict]) -> Table:
    """Verdicts as a table: name, number, standing and meaning."""
    tones: dict[Standing, Tone] = {"holds": "good", "partly": "warn", "fails": "bad"}
    heads = (Column("verdict", right=False), Column("figure"), Column("meaning", right=False, wraps=True))
    rows = tuple(
        (Cell(each.name, tone := tones[each.standing]), Cell(each.figure, tone), Cell(f"{each.standing}: {each.text}")) for each in found
    )
    return Table("Can this decomposition be trusted?", heads, rows)


def failures(found: Iterable[Verdict]) -> str:
    """The verdicts that fail, with their numbers; empty if none does."""
    return ", ".join(f"{each.name} {each.figure}" for each in found if each.standing == "fails")


def _kl(name: str, value: float, text: str) -> Verdict:
    return Verdict(name, _standing(value, NATS), f"{value:.1e} nats" if value < 0.01 else f"{value:.2f} nats", text)


def _standing(value: float, bounds: tuple[float, float]) -> Standing:
    """The standing of a value; NaN fails."""
    return "holds" if value <= bounds[0] else "partly" if value <= bounds[1] else "fails"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
