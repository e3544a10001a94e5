"""Functions that build the figures of a page in Plotly. `meta` of a trace is the number of its colour in the page's theme."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

NEUTRAL = 7
"""Number of the theme's neutral colour."""


@dataclass(frozen=True)
class Figure:
    """A figure of a page: its name, unique on the page, its caption, and its plot."""

    name: str
    caption: str
    plot: go.Figure

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """The figure's data as columns and rows, one row per point or cell."""
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


def pairs_figure(
    pairs: Mapping[str, Any], *, x: Sequence[Any], y: Sequence[Any], hover: str, height: int, texts: bool = False
) -> go.Figure:
    """The target on the left and the masked model on the right, one row per entry of `pairs`."""
    titles = [f"{name}, {side}" for name in pairs for side in ("target", "masked")]
    figure = make_subplots(len(pairs), 2, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=0.12 if len(pairs) > 1 else 0)
    for row, pair in enumerate(pairs.values(), 1):
        for column, side in enumerate(("target", "masked"), 1):
            text = [[f"{value:.2f}" for value in line] for line in pair[side]] if texts else None
            last = row == 1 and column == 2
            figure.add_trace(heatmap(pair[side], x=x, y=y, hover=hover, highest=1, texts=text, scale=last), row=row, col=column)
    figure.update_yaxes(autorange="reversed")
    return styled(figure, height=40 + height * len(pairs), top=30)


def heatmap(
    z: list[list[float]],
    *,
    x: Sequence[Any],
    y: Sequence[Any],
    hover: str,
    texts: list[list[str]] | None = None,
    highest: float | None = None,
    scale: bool = True,
) -> go.Heatmap:
    """Cells z [row][column] on a colour scale from 0 to `highest`. Defaults to the largest value."""
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


def add_line(figure: go.Figure, name: str, x: list[int], y: list[float], colour: int, *, axis: str = "y", dash: str = "solid") -> None:
    """Draw a line in the theme's colour number `colour`."""
    figure.add_scatter(x=x, y=y, name=name, mode="lines", line={"width": 1.5, "dash": dash}, yaxis=axis, meta=colour)


def styled(figure: go.Figure, *, height: int, top: int = 10) -> go.Figure:
    """The figure with the page's font, margins and transparent background; height, top: pixels."""
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
