"""Tables and charts as plain data, for terminals and notebooks. Does not import torch or rich."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["plain", "faint", "strong", "good", "warn", "bad"]


@dataclass(frozen=True)
class Cell:
    """One cell of a table: a text and its look."""

    text: str
    tone: Tone = "plain"
    level: float | None = None
    """Darkness of the background, in [0, 1]. Defaults to no background."""
    hint: str = ""
    """Tooltip in a notebook."""


@dataclass(frozen=True)
class Column:
    """A column's name, and how its texts are aligned."""

    name: str
    right: bool = True
    wraps: bool = False
    """Whether its texts are prose that can fill several lines."""


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns.

    keys: number of columns at the left that name a row; if a table is too wide for a terminal, each of its blocks repeats them.
    strip: whether the columns are the tokens of a sentence; a notebook shows the sentence, shaded by the first row, with tooltips.
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
    """Curves over a common x, shown in notebooks, with y on a logarithmic scale. mark: y of a horizontal line."""

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    mark: float | None = None


def columns(first: str, *others: str) -> tuple[Column, ...]:
    """One left-aligned column of names and further columns of numbers."""
    return (Column(first, right=False), *(Column(name) for name in others))


def row(*texts: str, tone: Tone = "plain") -> tuple[Cell, ...]:
    """Cells with the same tone."""
    return tuple(Cell(text, tone) for text in texts)


def shaded(text: str, value: float, highest: float) -> Cell:
    """A number with a background that is darker the nearer it is to `highest`; faint if its text shows zero."""
    level = min(1.0, max(0.0, value / highest)) if highest > 0 else 0.0
    return Cell(text, "plain" if any(digit in text for digit in "123456789") else "faint", level)


def figure(value: float | None, places: int) -> str:
    """A number with `places` decimals, or a dash for None."""
    return "-" if value is None else f"{value:,.{places}f}"


def metric(name: str, value: float) -> str:
    """A metric as text: an accuracy with four decimals, all others in scientific notation."""
    return f"{value:.4f}" if name.startswith("accuracy") else f"{value:.2e}"


def site_cell(site: str) -> Cell:
    """A site's name without the usual prefixes of Hugging Face models."""
    short = site.removeprefix("transformer.").removeprefix("model.").removeprefix("gpt_neox.")
    return Cell(short, hint=site if short != site else "")


def token_text(token: str) -> str:
    """A token without surrounding spaces; if it is only spaces, in quotes."""
    return token.strip() or repr(token)


def visible(text: str) -> str:
    """`text` with unprintable characters, such as terminal escapes, written as escape sequences; line breaks are kept."""
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)


def packed(entries: Sequence[str], *, width: int, gap: str = "  ") -> list[str]:
    """Entries in order, in as few lines of `width` characters as possible; a longer entry gets its own line."""
    lines: list[str] = []
    for entry in entries:
        if lines and len(lines[-1]) + len(gap) + len(entry) <= width:
            lines[-1] += gap + entry
        else:
            lines.append(entry)
    return lines


def spread(counts: Iterable[int]) -> str:
    """The smallest and the largest of some counts, as "3 to 5"; "4" if all are the same."""
    found = sorted(counts)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"
