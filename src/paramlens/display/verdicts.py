"""Whether a decomposition can be trusted, in plain words with the figure: for the page, the commands and Python alike."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from paramlens.display.tables import Cell, Column, Table, Tone

Standing = Literal["holds", "partly", "fails"]

NATS = (0.01, 0.1)
"""KL up to which predictions are the target's, and up to which they are near it; nats per position that the loss sees."""

WEIGHTS = (1e-4, 1e-2)
"""Share of the weights' squared size left out of U V, likewise."""

ACCURACY = (0.005, 0.05)
"""Answers lost, likewise."""


@dataclass(frozen=True)
class Verdict:
    """One question, how it stands, the figure, and what it means."""

    name: str
    standing: Standing
    figure: str
    text: str


def verdicts(
    metrics: Mapping[str, float], *, off_data: Mapping[str, Any] | None = None, target: Mapping[str, Any] | None = None
) -> Iterator[Verdict]:
    """The verdicts that what was measured allows. The bounds are those of this module.

    metrics: of a circuit or of an evaluation, by name. off_data: as in `circuit.json`. target: as in `target.json`, where the target was
    trained here.
    """
    if target is not None and not target["converged"]:
        text = "The target had not converged when its training ended: what follows is the circuit of a half-trained model."
        yield Verdict("target", "fails", f"{target['checks'][-1]['accuracy']:.3f} right", text)
    if "faithfulness_relative" in metrics:
        relative = metrics["faithfulness_relative"]
        text = f"Mean squared difference of W and U V; {_percent(relative)} of the weights' squared size is left out."
        yield Verdict("weights", _standing(relative, WEIGHTS), f"{metrics['faithfulness']:.1e}", text)
    for metric, (name, text) in _DIVERGENCES.items():
        if metric in metrics:
            yield _kl(name, metrics[metric], text)
    if "accuracy_masked" in metrics:
        lost = metrics["accuracy_target"] - metrics["accuracy_masked"]
        text = f"Answers that the masked model gives right; the target: {metrics['accuracy_target']:.4f}."
        yield Verdict("answers", _standing(lost, ACCURACY), f"{metrics['accuracy_masked']:.4f}", text)
    if "recon_adversarial" in metrics:
        text = "The worst masks a search finds that turn on what importance calls not needed: how inert inactive parts really are."
        yield _kl("worst case", metrics["recon_adversarial"], text)
    if off_data is not None:
        yield _kl("off the data", off_data["recon"], _off_data(off_data))


_DIVERGENCES = {
    "recon": ("predictions", "Every subcomponent scaled by its importance: how far predictions are from the target's."),
    "recon_rounded": ("on or off", "The active subcomponents fully on, all others off: what Table 1 counts."),
}


def _off_data(found: Mapping[str, Any]) -> str:
    text = f"The masked model on {found['what']}, which it was not fitted on. "
    if found.get("parts") == 0:
        return f"{text}No part is active on its own data, so there is nothing to take out of the target."
    as_many = ", ".join(f"{name} {value:.2g}" for name, value in found["controls"].items())
    beside = f" (as many {as_many})" if as_many else ""
    return f"{text}Without the parts active on its own data the target there moves by {found['removed']:.2g} nats{beside}."


def verdict_table(found: Iterable[Verdict]) -> Table:
    """Verdicts as a table: what was asked, the figure, how it stands and what that means."""
    tones: dict[Standing, Tone] = {"holds": "good", "partly": "warn", "fails": "bad"}
    heads = (Column("verdict", right=False), Column("figure"), Column("meaning", right=False, wraps=True))
    rows = tuple(
        (Cell(each.name, tone := tones[each.standing]), Cell(each.figure, tone), Cell(f"{each.standing}: {each.text}")) for each in found
    )
    return Table("Can this decomposition be trusted?", heads, rows)


def failures(found: Iterable[Verdict]) -> str:
    """The verdicts that fail, with their figures; empty if none does."""
    return ", ".join(f"{each.name} {each.figure}" for each in found if each.standing == "fails")


def _kl(name: str, value: float, text: str) -> Verdict:
    return Verdict(name, _standing(value, NATS), f"{value:.1e} nats" if value < 0.01 else f"{value:.2f} nats", text)


def _standing(value: float, bounds: tuple[float, float]) -> Standing:
    """NaN fails."""
    return "holds" if value <= bounds[0] else "partly" if value <= bounds[1] else "fails"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
