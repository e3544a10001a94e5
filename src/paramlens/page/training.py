"""The page's section `Training`: figures from `metrics.jsonl` and from the training of the target."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from paramlens.display.figures import NEUTRAL, Figure, add_line, styled


def training_figures(metrics: Sequence[Mapping[str, Any]], target: Mapping[str, Any] | None) -> Iterator[Figure]:
    """The figures of the section. target: content of `target.json`. None: the target was not trained here."""
    yield Figure("losses", "Losses over training, logarithmic.", losses_figure(metrics))
    yield Figure("active", "Active subcomponents per position over training, by site.", active_figure(metrics))
    if target is not None:
        yield Figure("target", "The target's training: its phase change (Figure 5).", target_figure(target))


def losses_figure(metrics: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Training losses and the evaluated reconstruction over steps."""
    figure = go.Figure()
    trained = [line for line in metrics if "losses" in line]
    evaluated = [line for line in metrics if "evaluation" in line]
    for colour, name in enumerate(trained[-1]["losses"] if trained else []):
        shown = [line for line in trained if name in line["losses"]]  # an adversary begins later
        add_line(figure, name, [line["step"] for line in shown], [line["losses"][name] for line in shown], colour)
    if evaluated:
        recon = [line["evaluation"]["recon"] for line in evaluated]
        add_line(figure, "recon, evaluated", [line["step"] for line in evaluated], recon, NEUTRAL, dash="dot")
    figure.update_yaxes(type="log", exponentformat="power")
    figure.update_xaxes(title="step")
    return styled(figure, height=380)


def active_figure(metrics: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Active subcomponents per position over steps, one line per site."""
    figure = go.Figure()
    trained = [line for line in metrics if "active" in line]
    for colour, site in enumerate(trained[-1]["active"] if trained else []):
        add_line(figure, site, [line["step"] for line in trained], [line["active"][site] for line in trained], colour)
    figure.update_yaxes(type="log", exponentformat="power", title="active per position")
    figure.update_xaxes(title="step")
    return styled(figure, height=380)


def target_figure(target: Mapping[str, Any]) -> go.Figure:
    """Cross-entropy, accuracy and the other measurements over the target's training."""
    checks = target["checks"]
    steps = [check["step"] for check in checks]
    figure = go.Figure()
    add_line(figure, "loss, nats", steps, [check["loss"] for check in checks], 0)
    names = {
        "accuracy": "accuracy",
        "probability": "probability of the answer",
        "attention_m_s1": "attention m→s1",
        "attention_s2_m": "attention s2→m",
    }
    for colour, (key, name) in enumerate(((key, name) for key, name in names.items() if key in checks[0]), 1):
        add_line(figure, name, steps, [check[key] for check in checks], colour, axis="y2")
    figure.update_layout(
        xaxis={"title": "step"},
        yaxis={"title": "nats"},
        yaxis2={"overlaying": "y", "side": "right", "range": [0, 1.05], "dtick": 0.25, "showgrid": False},
    )
    return styled(figure, height=340)
