"""Whether a decomposition can be trusted, in plain words with the figure: what the page says first."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

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


def verdicts(circuit: Mapping[str, Any], target: Mapping[str, Any] | None) -> Iterator[Verdict]:
    """From `circuit.json`, and the target's training where there was one. The bounds are those of this module."""
    metrics = circuit["metrics"]
    if target is not None and not target["converged"]:
        text = "The target had not converged when its training ended: what follows is the circuit of a half-trained model."
        yield Verdict("target", "fails", f"{target['checks'][-1]['accuracy']:.3f} right", text)
    relative = metrics["faithfulness_relative"]
    yield Verdict(
        "weights",
        _standing(relative, WEIGHTS),
        f"{metrics['faithfulness']:.1e}",
        f"Mean squared difference of W and U V; {_percent(relative)} of the weights' squared size is left out.",
    )
    yield _kl(
        "predictions",
        metrics["recon"],
        "Every subcomponent scaled by its importance: how far predictions are from the target's.",
    )
    yield _kl(
        "on or off",
        metrics["recon_rounded"],
        "The active subcomponents fully on, all others off: what Table 1 counts.",
    )
    if "accuracy_masked" in metrics:
        lost = metrics["accuracy_target"] - metrics["accuracy_masked"]
        text = f"Answers that the masked model gives right; the target: {metrics['accuracy_target']:.4f}."
        yield Verdict("answers", _standing(lost, ACCURACY), f"{metrics['accuracy_masked']:.4f}", text)
    if "recon_adversarial" in metrics:
        text = "The worst masks a search finds that turn on what importance calls not needed: how inert inactive parts really are."
        yield _kl("worst case", metrics["recon_adversarial"], text)
    if (off := circuit["off_data"]) is not None:
        controls = ", ".join(f"{name} {value:.2g}" for name, value in off["controls"].items())
        text = (
            f"The masked model on {off['what']}, which it was not fitted on. Without the parts active on its own data the target there "
            f"moves by {off['removed']:.2g} nats (as many {controls})."
        )
        yield _kl("off the data", off["recon"], text)


def _kl(name: str, value: float, text: str) -> Verdict:
    return Verdict(name, _standing(value, NATS), f"{value:.1e} nats" if value < 0.01 else f"{value:.2f} nats", text)


def _standing(value: float, bounds: tuple[float, float]) -> Standing:
    return "holds" if value <= bounds[0] else "partly" if value <= bounds[1] else "fails"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
