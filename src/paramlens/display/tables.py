"""Tables and charts as plain data, for the terminal and for notebooks. Imports neither torch nor rich."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["plain", "faint", "strong", "good", "warn", "bad"]


@dataclass(frozen=True)
class Cell:
    """A text to show."""

    text: str
    tone: Tone = "plain"
    level: float | None = None
    """How dark its background is, in [0, 1]. Defaults to no background."""
    hint: str = ""
    """A tooltip in a notebook."""


@dataclass(frozen=True)
class Column:
    """A column's head, and where its texts stand."""

    name: str
    right: bool = True
    wraps: bool = False
    """Whether its texts are prose that may run over several lines."""


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns.

    keys: this many columns at the left name a row; they come again where a table is too wide for a terminal and is shown in blocks.
    strip: the columns are the tokens of a sentence; a notebook shows the sentence, shaded by the first row, the rows under the pointer.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[Cell, ...] = ()
    keys: int = 1
    headed: bool = True
    """Whether the names of the columns are shown."""
    strip: bool = False


@dataclass(frozen=True)
class Line:
    """One curve of a chart: points (x, y)."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """Curves over a common x, which notebooks show; y is on a logarithmic scale. mark: a level drawn across."""

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    mark: float | None = None


def columns(first: str, *others: str) -> tuple[Column, ...]:
    """A column of names at the left, and columns of numbers."""
    return (Column(first, right=False), *(Column(name) for name in others))


def row(*texts: str, tone: Tone = "plain") -> tuple[Cell, ...]:
    """Cells of one tone."""
    return tuple(Cell(text, tone) for text in texts)


def shaded(text: str, value: float, highest: float) -> Cell:
    """A number, its ground the deeper the nearer it is to `highest`; faint where it is shown as zero."""
    level = min(1.0, max(0.0, value / highest)) if highest > 0 else 0.0
    return Cell(text, "plain" if any(digit in text for digit in "123456789") else "faint", level)


def figure(value: float | None, places: int) -> str:
    """A number to so many places, or a dash for none."""
    return "-" if value is None else f"{value:,.{places}f}"


def metric(name: str, value: float) -> str:
    """A metric as it is printed: an accuracy to four places, anything else with its exponent."""
    return f"{value:.4f}" if name.startswith("accuracy") else f"{value:.2e}"


def site_cell(site: str) -> Cell:
    """A site's name without what all Hugging Face models begin with."""
    short = site.removeprefix("transformer.").removeprefix("model.").removeprefix("gpt_neox.")
    return Cell(short, hint=site if short != site else "")


def token_text(token: str) -> str:
    """A token without the space before it; one of spaces alone, quoted."""
    return token.strip() or repr(token)


def visible(text: str) -> str:
    """`text` with every character that does not print, an escape sequence's say, written out; lines stay lines."""
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)


def packed(entries: Sequence[str], *, width: int, gap: str = "  ") -> list[str]:
    """Entries in as few lines as hold them at `width` characters, in order; one that is longer has a line of its own."""
    lines: list[str] = []
    for entry in entries:
        if lines and len(lines[-1]) + len(gap) + len(entry) <= width:
            lines[-1] += gap + entry
        else:
            lines.append(entry)
    return lines
