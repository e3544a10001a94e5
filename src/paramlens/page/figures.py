"""The page's figures, from the JSON of a run directory. `meta` of a trace is its number among the theme's colours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

_LAST = 7
"""The neutral one of the theme's colours."""


@dataclass(frozen=True)
class Figure:
    """A figure of the page: its name, the section it belongs to, what it shows, and its data as a table."""

    name: str
    section: str
    caption: str
    plot: go.Figure

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows, one for each point or cell."""
        traces: list[dict[str, Any]] = self.plot.to_plotly_json()["data"]
        if all(trace["type"] == "heatmap" for trace in traces):
            titles = [each.text for each in self.plot.layout.annotations] or [""] * len(traces)
            rows = [
                [title, x, y, value]
                for title, trace in zip(titles, traces, strict=True)
                for y, row in zip(trace["y"], trace["z"], strict=True)
                for x, value in zip(trace["x"], row, strict=True)
            ]
            return ["panel", "across", "down", "value"], rows
        return ["series", "x", "y"], [[trace["name"], x, y] for trace in traces for x, y in zip(trace["x"], trace["y"], strict=True)]


def losses_figure(metrics: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Training losses and evaluated reconstruction over steps."""
    figure = go.Figure()
    trained = [line for line in metrics if "losses" in line]
    evaluated = [line for line in metrics if "evaluation" in line]
    for colour, name in enumerate(trained[-1]["losses"] if trained else []):
        _line(figure, name, [line["step"] for line in trained], [line["losses"][name] for line in trained], colour)
    if evaluated:
        recon = [line["evaluation"]["recon"] for line in evaluated]
        _line(figure, "recon, evaluated", [line["step"] for line in evaluated], recon, _LAST, dash="dot")
    figure.update_yaxes(type="log", exponentformat="power")
    figure.update_xaxes(title="step")
    return _styled(figure, height=380)


def active_figure(metrics: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Active subcomponents per position over steps, a line a site."""
    figure = go.Figure()
    trained = [line for line in metrics if "active" in line]
    for colour, site in enumerate(trained[-1]["active"] if trained else []):
        _line(figure, site, [line["step"] for line in trained], [line["active"][site] for line in trained], colour)
    figure.update_yaxes(type="log", exponentformat="power", title="active per position")
    figure.update_xaxes(title="step")
    return _styled(figure, height=380)


def agreement_figure(agreement: Mapping[str, Any]) -> go.Figure:
    """By site how far runs of other seeds agree, in [0, 1]: together, by direction and by pattern, and by chance."""
    sites, figure = agreement["sites"], go.Figure()
    names = {"agreement": "agreement", "direction": "direction", "pattern": "pattern", "chance": "by chance"}
    for colour, (key, name) in enumerate(names.items()):
        figure.add_bar(x=list(sites), y=[site[key] for site in sites.values()], name=name, meta=colour)
    figure.update_yaxes(range=[0, 1])
    return _styled(figure, height=340)


def attention_figure(circuit: Mapping[str, Any]) -> go.Figure:
    """Patterns × roles of the query, KL in nats."""
    patterns = list(circuit["attention_kl"])
    roles = [*circuit["roles"], "all"] if "all" not in circuit["roles"] else circuit["roles"]
    z = [[circuit["attention_kl"][pattern][role] for role in roles] for pattern in patterns]
    return _map(z, x=roles, y=patterns, texts=[[f"{value:.3f}" for value in row] for row in z], hover="%{y}, query %{x}: %{z:.4f} nats")


def patterns_figure(circuit: Mapping[str, Any]) -> go.Figure:
    """Attention of one sequence, target beside masked model, a row for each pattern; keys across, queries down."""
    attention = circuit["example"]["attention"]
    positions = list(range(len(circuit["example"]["roles"])))
    return _pairs(attention, x=positions, y=positions, hover="query %{y}, key %{x}: %{z:.3f}", height=330)


def role_attention_figure(circuit: Mapping[str, Any]) -> go.Figure:
    """Attention from queries of a role (down) to all keys of a role (across), target beside masked model, a row for each pattern."""
    roles = circuit["roles"]
    return _pairs(circuit["attention_by_role"], x=roles, y=roles, hover="from %{y} to %{x}: %{z:.4f}", height=220, texts=True)


def svd_figure(svd: Mapping[str, Any]) -> go.Figure:
    """Figure 2 as curves: KL against the number of rank-1 parts, for pruned SVD and for the decomposition at several thresholds."""
    figure = go.Figure()
    curve, ours = svd["curve"], svd["decomposition"]
    counts = {name: [sum(point[name].values()) for point in ours] for name in ("active", "unique")}
    for name, x, y, colour in (
        ("SVD, rank left", [point["total"] for point in curve], [point["kl"] for point in curve], 1),
        ("active at their role", counts["active"], [point["kl"] for point in ours], 0),
        ("unique, the active ones on", counts["unique"], [point["kl"] for point in ours], 2),
        ("unique, all on everywhere", counts["unique"], [point["kl_static"] for point in ours], _LAST),
    ):
        points = {"size": 4 if name.startswith("SVD") else 7}
        y = [max(value, 1e-9) for value in y]
        figure.add_scatter(x=x, y=y, name=name, mode="lines+markers", line={"width": 1.5}, marker=points, meta=colour)
    figure.add_hline(y=svd["tolerance"], line={"color": "#9aa3af", "dash": "dot", "width": 1})
    figure.update_yaxes(type="log", exponentformat="power", title="KL, nats")
    figure.update_xaxes(title="rank-1 parts, all sites")
    return _styled(figure, height=380)


def suppression_figure(edit: Mapping[str, Any]) -> go.Figure:
    """Figures 3 and 4 as bars: by kind of fact the share of its probability that an answer keeps, for the edit and its controls."""
    figure = go.Figure()
    effects = {f"{len(edit['selected'])} subcomponents": edit["effect"], **edit["controls"]}
    for colour, (name, effect) in enumerate(effects.items()):
        kept = effect["kept"]
        hover = "%{x}, " + name + ": %{y:.3f}<extra></extra>"
        figure.add_bar(x=list(kept), y=list(kept.values()), name=name, meta=colour, hovertemplate=hover)
    figure.add_hline(y=1, line={"color": "#9aa3af", "dash": "dot", "width": 1})
    figure.update_yaxes(title="share kept, median", rangemode="tozero")
    return _styled(figure, height=340)


def trace_figure(trace: Mapping[str, Any]) -> go.Figure:
    """Figures 7 and 8: blocks (across) and tokens (down), the answer's probability with that state restored; hidden, MLP, attention."""
    kinds = ("hidden", "mlp", "attention")
    figure = make_subplots(1, 3, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=["hidden state", "MLP", "attention"])
    marked = trace["subject_positions"]
    labels = [f"{i} {token.strip()}{'*' if i in marked else ''}" for i, token in enumerate(trace["positions"])]
    highest = max(trace["clean"], *(value for kind in kinds for row in trace[kind] for value in row))
    for column, kind in enumerate(kinds, 1):
        z = [list(values) for values in zip(*trace[kind], strict=True)]
        blocks = list(range(len(trace[kind])))
        heatmap = _heatmap(z, x=blocks, y=labels, hover="block %{x}, %{y}: %{z:.3f}", highest=highest, scale=column == 3)
        figure.add_trace(heatmap, row=1, col=column)
    figure.update_xaxes(title="block", dtick=1)
    figure.update_yaxes(autorange="reversed")
    return _styled(figure, height=150 + 26 * len(labels), top=30)


def zero_figure(traces: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Figure 9: the answer's probability with one whole MLP put to zero; dashed: with all of them."""
    figure = go.Figure()
    for colour, trace in enumerate(traces):
        blocks, name = list(range(len(trace["zero_mlp"]))), f"{trace['prompt']} {trace['answer']}"
        figure.add_bar(x=blocks, y=trace["zero_mlp"], name=name, meta=colour)
        figure.add_scatter(
            x=blocks, y=[trace["clean"]] * len(blocks), name=f"{name}, whole", mode="lines", line={"dash": "dash", "width": 1}, meta=colour
        )
    figure.update_xaxes(title="block whose MLP is zero", dtick=1)
    figure.update_yaxes(title="probability of the answer", rangemode="tozero")
    return _styled(figure, height=320)


def target_figure(target: Mapping[str, Any]) -> go.Figure:
    """Cross-entropy, accuracy and what else was measured over the target's training."""
    checks = target["checks"]
    steps = [check["step"] for check in checks]
    figure = go.Figure()
    _line(figure, "loss, nats", steps, [check["loss"] for check in checks], 0)
    names = {
        "accuracy": "accuracy",
        "probability": "probability of the answer",
        "attention_m_s1": "attention m→s1",
        "attention_s2_m": "attention s2→m",
    }
    for colour, (key, name) in enumerate(((key, name) for key, name in names.items() if key in checks[0]), 1):
        _line(figure, name, steps, [check[key] for check in checks], colour, axis="y2")
    figure.update_layout(
        xaxis={"title": "step"},
        yaxis={"title": "nats"},
        yaxis2={"overlaying": "y", "side": "right", "range": [0, 1.05], "dtick": 0.25, "showgrid": False},
    )
    return _styled(figure, height=340)


def _pairs(pairs: Mapping[str, Any], *, x: Sequence[Any], y: Sequence[Any], hover: str, height: int, texts: bool = False) -> go.Figure:
    """Target on the left, masked model on the right, one row for each entry of `pairs`."""
    titles = [f"{name}, {side}" for name in pairs for side in ("target", "masked")]
    figure = make_subplots(len(pairs), 2, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=0.12 if len(pairs) > 1 else 0)
    for row, pair in enumerate(pairs.values(), 1):
        for column, side in enumerate(("target", "masked"), 1):
            text = [[f"{value:.2f}" for value in line] for line in pair[side]] if texts else None
            last = row == 1 and column == 2
            figure.add_trace(_heatmap(pair[side], x=x, y=y, hover=hover, highest=1, texts=text, scale=last), row=row, col=column)
    figure.update_yaxes(autorange="reversed")
    return _styled(figure, height=40 + height * len(pairs), top=30)


def _map(z: list[list[float]], *, x: Sequence[Any], y: Sequence[str], hover: str, texts: list[list[str]] | None = None) -> go.Figure:
    figure = go.Figure(_heatmap(z, x=x, y=y, hover=hover, texts=texts))
    figure.update_yaxes(autorange="reversed", automargin=True)
    return _styled(figure, height=90 + 34 * len(y))


def _heatmap(
    z: list[list[float]],
    *,
    x: Sequence[Any],
    y: Sequence[Any],
    hover: str,
    texts: list[list[str]] | None = None,
    highest: float | None = None,
    scale: bool = True,
) -> go.Heatmap:
    return go.Heatmap(
        z=z,
        x=list(x),
        y=list(y),
        text=texts,
        texttemplate="%{text}" if texts else None,
        hovertemplate=hover + "<extra></extra>",
        zmin=0,
        zmax=highest,
        showscale=scale,
        colorbar={"thickness": 10},
    )


def _line(figure: go.Figure, name: str, x: list[int], y: list[float], colour: int, *, axis: str = "y", dash: str = "solid") -> None:
    figure.add_scatter(x=x, y=y, name=name, mode="lines", line={"width": 1.5, "dash": dash}, yaxis=axis, meta=colour)


def _styled(figure: go.Figure, *, height: int, top: int = 10) -> go.Figure:
    figure.update_layout(
        height=height,
        margin={"l": 10, "r": 10, "t": top, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": -0.25},
        font={"family": "system-ui, sans-serif", "size": 13},
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure
