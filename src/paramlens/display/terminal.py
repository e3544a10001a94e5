"""Tables in a terminal, complete at any width: columns that do not fit side by side are printed in blocks, one below the other."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.table import Table as RichTable
from rich.text import Text

from paramlens.display.tables import Cell, Table, Tone, token_text, visible

_TONES: dict[Tone, str] = {"plain": "", "faint": "dim", "strong": "bold", "good": "green", "warn": "yellow", "bad": "red"}
_LIGHT, _DEEP = (222, 235, 247), (8, 69, 148)
_KEY = 36
"""Maximum width of the names of rows, in characters."""
_LEAST = 20
"""Minimum width that a terminal is assumed to have, in characters."""
_PROSE = 24
"""Minimum width of a column of prose, in characters."""


def print_tables(tables: Sequence[Table], console: Console | None = None, *, after: bool = False) -> None:
    """Print tables on `console`. Defaults to stdout. No text is cut, and no line is wider than the console (at least `_LEAST`).

    after: print a blank line before the first table too.
    """
    console = console or Console()
    console.width = max(_LEAST, console.width)
    for i, table in enumerate(tables):
        if i or after:
            console.print()
        if table.title:
            _line(Cell(table.title, "strong"), console)
        if table.rows:
            for number, (block, widths, gap) in enumerate(_blocks(table, console.width)):
                if number:
                    console.print()
                console.print(_rich(table, block, widths, gap))
        for note in table.notes:
            _line(note, console)


def _line(cell: Cell, console: Console) -> None:
    console.print(Text(visible(cell.text), style=_TONES[cell.tone], overflow="fold"))


def _blocks(table: Table, width: int) -> Iterator[tuple[list[int], list[int], int]]:
    """Blocks of columns printed side by side, with their widths and the gap between them; one block if all columns fit.

    To fit all columns, it tries heads on one line, then on several lines, then one space between columns instead of two.
    """
    every = list(range(len(table.columns)))
    if any(column.wraps for column in table.columns):
        yield every, _with_prose(table, width), 2
        return
    for gap, whole in ((2, True), (2, False), (1, False)):
        widths = [_width(table, i, width, whole=whole) for i in every]
        if sum(widths) + gap * (len(every) - 1) <= width:
            yield every, widths, gap
            return
    keys, gap = every[: table.keys], 2
    widths = [_width(table, i, width, whole=False) for i in every]
    used = sum(widths[i] + gap for i in keys)
    block = list[int]()
    for i in every[table.keys :]:
        widths[i] = min(widths[i], width - used)
        if block and used + sum(widths[j] + gap for j in block) + widths[i] > width:
            yield [*keys, *block], [widths[j] for j in [*keys, *block]], gap
            block = []
        block.append(i)
    yield [*keys, *block], [widths[j] for j in [*keys, *block]], gap


def _width(table: Table, index: int, width: int, *, whole: bool) -> int:
    """Width of a column: of its longest cell, and of its head (whole) or the head's longest word."""
    name = token_text(visible(table.columns[index].name)) if table.headed else ""
    head = [name] if whole else name.split()
    natural = max(cell_len(text) for text in ["", *head, *(visible(cells[index].text) for cells in table.rows)])
    return min(natural, _KEY, width // 2) if index < table.keys and natural > width // 3 else natural


def _with_prose(table: Table, width: int) -> list[int]:
    """Widths for a table with columns of prose, which share the width that the other columns leave."""
    widths = [_width(table, i, width, whole=False) for i in range(len(table.columns))]
    prose = [i for i, column in enumerate(table.columns) if column.wraps]
    others = [i for i in range(len(widths)) if i not in prose]
    gaps = 2 * (len(widths) - 1)
    free = width - gaps - sum(widths[i] for i in others)
    if free < _PROSE * len(prose):
        for i in others:
            widths[i] = min(widths[i], (width - gaps - _PROSE * len(prose)) // len(others))
        free = width - gaps - sum(widths[i] for i in others)
    for i in prose:
        widths[i] = min(widths[i], free // len(prose))
    return widths


def _rich(table: Table, block: Sequence[int], widths: Sequence[int], gap: int) -> RichTable:
    made = RichTable(box=_RULE, show_header=table.headed, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
    for i, width in zip(block, widths, strict=True):
        column = table.columns[i]
        head = Text(token_text(visible(column.name)), style="bold", overflow="fold")
        justify = "right" if column.right else "left"
        made.add_column(head, justify=justify, overflow="fold", width=width, vertical="top", header_style="", no_wrap=False)
    for cells in table.rows:
        made.add_row(*[_cell(cells[i], width, wraps=table.columns[i].wraps) for i, width in zip(block, widths, strict=True)])
    return made


_RULE = box.Box("    \n    \n ── \n    \n    \n    \n    \n    \n")
"""Rich's box style with a line under the heads and one space between columns."""


def _cell(cell: Cell, width: int, *, wraps: bool) -> Text:
    text = visible(cell.text)
    return Text(text if wraps else _broken(text, width), style=_style(cell), overflow="fold")


def _style(cell: Cell) -> Style:
    if not cell.level:
        return Style.parse(_TONES[cell.tone])
    ground = [round(light + (deep - light) * cell.level) for light, deep in zip(_LIGHT, _DEEP, strict=True)]
    return Style.parse(f"{'#ffffff' if cell.level > 0.5 else '#000000'} on #{''.join(f'{each:02x}' for each in ground)}")


def _broken(text: str, width: int) -> str:
    """A long name broken into lines, after a dot, slash, underscore or space if possible."""
    lines = list[str]()
    while cell_len(text) > width:
        cut = next((i for i in range(width, width // 2, -1) if text[i - 1] in "./_ "), width)
        lines.append(text[:cut])
        text = text[cut:]
    return "\n".join([*lines, text])
