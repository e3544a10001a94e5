"""Results in a notebook: tables and charts as HTML that loads no other files and is readable in light and dark themes."""

import math
from collections.abc import Sequence
from html import escape

from paramlens.display.tables import Cell, Chart, Line, Table, Tone, visible

_TONES: dict[Tone, str] = {
    "plain": "",
    "faint": "opacity:.55;",
    "strong": "font-weight:600;",
    "good": "color:#2b8a3e;font-weight:600;",
    "warn": "color:#c05c00;font-weight:600;",
    "bad": "color:#e03131;font-weight:600;",
}
_COLOURS = ("#4d80bf", "#cc6633", "#339966", "#a05cb8", "#d0487a", "#8f8f3d", "#2299bb", "#888888")
_FONT = "font:13px system-ui,sans-serif;font-variant-numeric:tabular-nums;"
_POINTS = 240
"""Curves with more points are thinned to about this number."""


class Result:
    """A result: one line as text, tables and charts in a notebook."""

    def summary(self) -> str:
        """The result in one short line."""
        raise NotImplementedError

    def tables(self) -> tuple[Table, ...]:
        """The result as tables."""
        raise NotImplementedError

    def charts(self) -> tuple[Chart, ...]:
        """The result as charts. Defaults to no charts."""
        return ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary()})"

    def _repr_html_(self) -> str:
        return html(self.tables(), self.charts())


def html(tables: Sequence[Table], charts: Sequence[Chart] = ()) -> str:
    """Tables and charts as one HTML element, with inline styles and escaped text; it loads no other files."""
    parts = [*(_strip(table) if table.strip else _table(table) for table in tables), *(_chart(chart) for chart in charts)]
    return f'<div style="{_FONT}color:inherit">{"".join(parts)}</div>'


def _text(text: str) -> str:
    return escape(visible(text))


def _table(table: Table) -> str:
    head = ""
    if table.headed:
        cells = "".join(f'<th style="{_place(column.right)}font-weight:600">{_text(column.name.strip())}</th>' for column in table.columns)
        head = f'<thead><tr style="border-bottom:1px solid #8888">{cells}</tr></thead>'
    body = ""
    for cells in table.rows:
        shown = (_cell(cell, right=column.right) for cell, column in zip(cells, table.columns, strict=True))
        body += f'<tr style="background:none">{"".join(shown)}</tr>'
    whole = f'<table style="border-collapse:collapse;margin:4px 0;border:0;{_FONT}">{head}<tbody>{body}</tbody></table>'
    return f'{_title(table.title)}<div style="overflow-x:auto;max-width:100%">{whole}</div>{_notes(table.notes)}'


def _place(right: bool) -> str:
    return f"text-align:{'right' if right else 'left'};padding:2px 8px;white-space:pre;border:0;vertical-align:top;"


def _cell(cell: Cell, *, right: bool) -> str:
    hint = f' title="{_text(cell.hint)}"' if cell.hint else ""
    return f'<td style="{_place(right)}{_look(cell)}"{hint}>{_text(cell.text)}</td>'


def _look(cell: Cell) -> str:
    ground = f"background:rgba(70,130,200,{0.75 * cell.level:.2f});" if cell.level else ""
    return _TONES[cell.tone] + ground


def _title(title: str) -> str:
    return (
        f'<div style="font-weight:600;margin:8px 0 2px;white-space:pre-wrap;overflow-wrap:anywhere">{_text(title)}</div>' if title else ""
    )


def _notes(notes: Sequence[Cell]) -> str:
    return "".join(f'<div style="white-space:pre-wrap;overflow-wrap:anywhere;{_look(note)}">{_text(note.text)}</div>' for note in notes)


def _strip(table: Table) -> str:
    """Tokens as spans; the tooltip of each shows its values."""
    names = [cells[0].text for cells in table.rows]
    spans = ""
    for i, column in enumerate(table.columns[table.keys :], table.keys):
        values = ", ".join(f"{name} {cells[i].text}" for name, cells in zip(names, table.rows, strict=True))
        spans += f'<span style="border-radius:2px;{_look(Cell("", level=table.rows[0][i].level))}" title="{_text(values)}">'
        spans += f"{_text(column.name)}</span>"
    whole = f'<div style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7;margin:2px 0">{spans}</div>'
    return f"{_title(table.title)}{whole}{_notes(table.notes)}"


def _chart(chart: Chart) -> str:
    """Curves as a small SVG with y on a logarithmic scale, without values of 0 or below."""
    lines = [(line, _thinned(line)) for line in chart.lines]
    points = [point for _, kept in lines for point in kept]
    if len({x for x, _ in points}) < 2:
        return ""
    marks = [chart.mark] if chart.mark and chart.mark > 0 else []
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = (bound(math.log10(y) for y in [*(y for _, y in points), *marks]) for bound in (min, max))
    low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    width, height, x0, y0, top = 520, 204, 46, 174, 24

    def place(x: float, y: float) -> str:
        return f"{x0 + (x - left) / (right - left) * (width - x0 - 8):.1f},{y0 - (math.log10(y) - low) / (high - low) * (y0 - top):.1f}"

    drawn = f'<path d="M{x0},{top}V{y0}H{width - 8}" fill="none" stroke="#888"/>'
    for i, (line, kept) in enumerate(lines):
        path = " ".join(place(x, y) for x, y in kept)
        drawn += f'<polyline points="{path}" fill="none" stroke="{_COLOURS[i % len(_COLOURS)]}" stroke-width="1.5">'
        drawn += f"<title>{_text(line.name)}</title></polyline>"
    for mark in marks:
        drawn += f'<polyline points="{place(left, mark)} {place(right, mark)}" fill="none" stroke="#888" stroke-dasharray="3 3"/>'
    for x, y, anchor, text in (
        (x0 - 4, top + 8, "end", f"1e{high}"),
        (x0 - 4, y0, "end", f"1e{low}"),
        (x0, y0 + 14, "start", f"{left:g}"),
        (width - 8, y0 + 14, "end", f"{right:g}"),
        ((x0 + width) // 2, y0 + 14, "middle", chart.x),
        (x0, 12, "start", chart.y),
    ):
        drawn += f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="currentColor" font-size="11">{_text(text)}</text>'
    legend = " ".join(
        f'<span style="margin-right:12px;white-space:nowrap"><span style="color:{_COLOURS[i % len(_COLOURS)]}">&#9632;</span> '
        f"{_text(line.name)}</span>"
        for i, (line, _) in enumerate(lines)
    )
    figure = f'<svg viewBox="0 0 {width} {height}" width="{width}" style="max-width:100%" role="img">{drawn}</svg>'
    return f"{_title(chart.title)}{figure}<div>{legend}</div>"


def _thinned(line: Line) -> list[tuple[float, float]]:
    points = [(x, y) for x, y in line.points if y > 0 and math.isfinite(y) and math.isfinite(x)]
    every = max(1, len(points) // _POINTS)
    return [*points[:-1:every], *points[-1:]]
