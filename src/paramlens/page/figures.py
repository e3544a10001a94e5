"""The page's figures, from the JSON of a run directory."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

_COLOURS = ["#3366aa", "#cc6633", "#339966", "#884499", "#bb3355", "#777733", "#2299bb", "#555555"]


def role_figure(circuit: Mapping[str, Any]) -> go.Figure:
    """Sites × roles, mean Σ_c g."""
    sites, roles = list(circuit["sites"]), circuit["roles"]
    z = [[circuit["sites"][site]["importance"][role] for role in roles] for site in sites]
    return _map(z, x=roles, y=sites, texts=[[f"{value:.2f}" for value in row] for row in z], hover="%{y}, %{x}: %{z:.3f}")


def example_figure(circuit: Mapping[str, Any]) -> go.Figure:
    """Sites × positions of one sequence; positions with a role of their own carry its name."""
    example = circuit["example"]
    common = max(set(example["roles"]), key=example["roles"].count)
    ticks = [i for i, role in enumerate(example["roles"]) if role != common or example["roles"].count(common) == 1]
    tokens = example["tokens"] or [""] * len(example["roles"])
    labels = [[f"position {i}, token {token}, {role}" for i, (token, role) in enumerate(zip(tokens, example["roles"], strict=True))]]
    sites = list(example["importance"])
    figure = _map(
        [example["importance"][site] for site in sites], x=list(range(len(tokens))), y=sites, hover="%{y}, %{customdata}: %{z:.3f}"
    )
    figure.data[0].customdata = labels * len(sites)
    named = [f"{'<br>' * (rank % 2)}{example['roles'][i]} ({i})" for rank, i in enumerate(ticks)]  # neighbours a line apart
    figure.update_xaxes(tickvals=ticks, ticktext=named, tickangle=0, title="position")
    return figure


def losses_figure(metrics: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Training losses and held-out reconstruction over steps."""
    figure = go.Figure()
    trained = [line for line in metrics if "losses" in line]
    held_out = [line for line in metrics if "evaluation" in line]
    for colour, name in zip(_COLOURS, trained[-1]["losses"] if trained else [], strict=False):
        _line(figure, name, [line["step"] for line in trained], [line["losses"][name] for line in trained], colour)
    if held_out:
        _line(
            figure,
            "recon, held out",
            [line["step"] for line in held_out],
            [line["evaluation"]["recon"] for line in held_out],
            "#000000",
            dash="dot",
        )
    figure.update_yaxes(type="log", exponentformat="power")
    figure.update_xaxes(title="step")
    return _styled(figure, height=380)


def attention_figure(circuit: Mapping[str, Any]) -> go.Figure:
    """Patterns × roles of the query, KL in nats."""
    patterns = list(circuit["attention_kl"])
    roles = [*circuit["roles"], "all"] if "all" not in circuit["roles"] else circuit["roles"]
    z = [[circuit["attention_kl"][pattern][role] for role in roles] for pattern in patterns]
    return _map(z, x=roles, y=patterns, texts=[[f"{value:.3f}" for value in row] for row in z], hover="%{y}, query %{x}: %{z:.4f} nats")


def maps_figure(circuit: Mapping[str, Any]) -> go.Figure:
    """One panel for each role that stands alone: sites × positions around it, mean Σ_c g."""
    maps, sites = circuit["maps"], list(circuit["sites"])
    highest = max(max(row) for each in maps.values() for row in each["importance"].values())
    figure = make_subplots(1, len(maps), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[f"around {role}" for role in maps])
    for column, (role, each) in enumerate(maps.items(), 1):
        z = [each["importance"][site] for site in sites]
        labels = [role if offset == 0 else f"{offset:+d}" for offset in each["offsets"]]
        heatmap = _heatmap(z, x=labels, y=sites, hover="%{y}, %{x}: %{z:.3f}", highest=highest, scale=column == len(maps))
        figure.add_trace(heatmap, row=1, col=column)
    figure.update_xaxes(type="category")  # "+1" would be read as a number, and the role's own name as none
    figure.update_yaxes(autorange="reversed")
    return _styled(figure, height=120 + 34 * len(sites), top=30)


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
        ("SVD, rank left", [point["total"] for point in curve], [point["kl"] for point in curve], _COLOURS[1]),
        ("active at their role", counts["active"], [point["kl"] for point in ours], _COLOURS[0]),
        ("unique, the active ones on", counts["unique"], [point["kl"] for point in ours], _COLOURS[2]),
        ("unique, all on everywhere", counts["unique"], [point["kl_static"] for point in ours], _COLOURS[7]),
    ):
        points = {"size": 4 if name.startswith("SVD") else 7}
        y = [max(value, 1e-9) for value in y]
        figure.add_scatter(x=x, y=y, name=name, mode="lines+markers", line={"color": colour, "width": 1.5}, marker=points)
    figure.add_hline(y=svd["tolerance"], line={"color": "#9aa3af", "dash": "dot", "width": 1})
    figure.update_yaxes(type="log", exponentformat="power", title="KL, nats")
    figure.update_xaxes(title="rank-1 parts, all sites")
    return _styled(figure, height=380)


def suppression_figure(edit: Mapping[str, Any]) -> go.Figure:
    """Figures 3 and 4 as bars: by kind of fact the share of its probability that an answer keeps, for the edit and its controls."""
    figure = go.Figure()
    effects = {f"{len(edit['selected'])} subcomponents": edit["effect"], **edit["controls"]}
    for colour, (name, effect) in zip(_COLOURS, effects.items(), strict=False):
        kept = effect["kept"]
        hover = "%{x}, " + name + ": %{y:.3f}<extra></extra>"
        figure.add_bar(x=list(kept), y=list(kept.values()), name=name, marker={"color": colour}, hovertemplate=hover)
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
    for colour, trace in zip(_COLOURS, traces, strict=False):
        blocks = list(range(len(trace["zero_mlp"])))
        figure.add_bar(x=blocks, y=trace["zero_mlp"], name=f"{trace['prompt']} {trace['answer']}", marker={"color": colour})
        figure.add_hline(y=trace["clean"], line={"color": colour, "dash": "dash", "width": 1})
    figure.update_xaxes(title="block whose MLP is zero", dtick=1)
    figure.update_yaxes(title="probability of the answer", rangemode="tozero")
    return _styled(figure, height=320)


def target_figure(target: Mapping[str, Any]) -> go.Figure:
    """Cross-entropy, accuracy and what else was measured over the target's training."""
    checks = target["checks"]
    steps = [check["step"] for check in checks]
    figure = go.Figure()
    _line(figure, "loss, nats", steps, [check["loss"] for check in checks], _COLOURS[0])
    names = {
        "accuracy": "accuracy",
        "probability": "probability of the answer",
        "attention_m_s1": "attention m→s1",
        "attention_s2_m": "attention s2→m",
    }
    for colour, (key, name) in zip(_COLOURS[1:], ((key, name) for key, name in names.items() if key in checks[0]), strict=False):
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
        colorscale=[[0, "#f4f6fa"], [0.15, "#b9cde8"], [0.5, "#4d80bf"], [1, "#12305c"]],
        zmin=0,
        zmax=highest,
        showscale=scale,
        colorbar={"thickness": 10},
    )


def _line(figure: go.Figure, name: str, x: list[int], y: list[float], colour: str, *, axis: str = "y", dash: str = "solid") -> None:
    figure.add_scatter(x=x, y=y, name=name, mode="lines", line={"color": colour, "width": 1.5, "dash": dash}, yaxis=axis)


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
