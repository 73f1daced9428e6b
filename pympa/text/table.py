"""Tables as plain text; on a narrow terminal they are split, and no number is ever cut.

Rich draws them, without colours and other codes: the terminal of a rank may belong to a launcher
that writes its output to a file.
"""

from __future__ import annotations

import io
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Drawing
from rich.text import Text

from pympa.text.escape import shown

_WIDTH_WITHOUT_TERMINAL = 176
_MARGIN = "  "
_BETWEEN = 3  # spaces between columns and around them in this box style
Cell = str | Sequence[str]
"""The contents of a cell: one line, or several."""


@dataclass
class _Column:
    """A heading and the lines of each cell below it; text may wrap, numbers are right-aligned."""

    heading: str
    text: bool
    cells: list[list[str]] = field(default_factory=list)

    def full(self) -> int:
        """Return the width at which nothing wraps."""
        lines = [*self.heading.split("\n"), *(line for cell in self.cells for line in cell)]
        return max(map(cell_len, lines))

    def least(self) -> int:
        """Return the width below which a word or a number would be cut."""
        lines = [line for cell in self.cells for line in cell]
        words = [*self.heading.split(), *(" ".join(lines).split() if self.text else lines)]
        return max(map(cell_len, words), default=0)


class Table:
    """Rows under headings.

    Args:
        title: the line above the table.
        caption: the lines below the table.
        keys: the number of first columns that identify rows; they are repeated in each part.
    """

    def __init__(self, title: str = "", caption: Sequence[str] = (), keys: int = 1) -> None:
        self.title = shown(title)
        self.caption = "\n".join(map(shown, caption))
        self._keys = keys
        self._columns: list[_Column] = []

    def add_column(self, heading: str, *, text: bool = False) -> None:
        """Add a column of numbers, or of text, which wraps if necessary.

        Args:
            heading: the heading, with line breaks; it wraps further if necessary.
            text: whether the column holds text, not numbers.
        """
        self._columns.append(_Column(heading, text))

    def add_row(self, *cells: Cell) -> None:
        """Add a row: for each column one line, or several."""
        for column, cell in zip(self._columns, cells, strict=True):
            column.cells.append([*map(shown, [cell] if isinstance(cell, str) else cell)])

    def lines(self, width: int) -> Iterator[str]:
        """Yield the lines of the table, without line ends, for a terminal of a width."""
        yield from _wrapped(self.title, width)
        parts = self._parts(width)
        for number, part in enumerate(parts or []):
            if number or self.title:
                yield ""
            yield from _drawn(part, width)
        if parts is None:
            yield from self._blocks(width)
        if self.caption:
            yield ""
            yield from _wrapped(self.caption, width)

    def _parts(self, width: int) -> list[list[_Column]] | None:
        """Return the columns of each part; None if some column does not fit beside the keys."""
        keys, others = self._columns[: self._keys], self._columns[self._keys :]
        parts = [list(keys)]
        for column in others:
            if len(parts[-1]) > len(keys) and _least([*parts[-1], column]) > width:
                parts.append(list(keys))
            parts[-1].append(column)
        return parts if all(_least(part) <= width for part in parts) else None

    def _blocks(self, width: int) -> Iterator[str]:
        """Yield each row as several lines, with a heading and a cell in each."""
        for row in range(len(self._columns[0].cells)):
            if row or self.title:
                yield ""
            for index, column in enumerate(self._columns):
                heading = " ".join(column.heading.split())
                cell = (" " if column.text else "; ").join(column.cells[row])
                text = f"{heading}: {cell}" if heading else cell
                margin = "" if index < self._keys else _MARGIN
                yield from _wrapped(text, width, margin, 2 * _MARGIN)


def show(table: Table) -> None:
    """Print a table at the width of the terminal, or wide without a terminal."""
    width = _WIDTH_WITHOUT_TERMINAL
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    encoding = sys.stdout.encoding or "utf-8"
    text = "\n".join(table.lines(width))
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def _least(columns: Sequence[_Column]) -> int:
    return sum(column.least() + _BETWEEN for column in columns) + 1


def _drawn(columns: Sequence[_Column], width: int) -> list[str]:
    """Return the lines of adjacent columns; spare width goes to columns one by one."""
    widths = [column.least() for column in columns]
    free, full = width - _least(columns), [column.full() for column in columns]
    while free > 0 and widths != full:
        for index, wanted in enumerate(full):
            if widths[index] < wanted and free > 0:
                widths[index] += 1
                free -= 1
    drawing = Drawing(box=SIMPLE_HEAD, show_header=any(column.heading for column in columns))
    for column, of_column in zip(columns, widths, strict=True):
        drawing.add_column(
            Text(column.heading), width=of_column, justify="left" if column.text else "right"
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        drawing.add_row(*(Text("\n".join(cell)) for cell in cells))
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as text:
        console.print(drawing)
    return [line.rstrip() for line in text.get().strip("\n").split("\n") if line.strip()]


def _wrapped(text: str, width: int, margin: str = "", after: str = "") -> Iterator[str]:
    """Yield lines that break only between words; a word wider than a line stays whole."""
    for line in text.split("\n") if text else []:
        yield from textwrap.wrap(
            line,
            width,
            initial_indent=margin,
            subsequent_indent=after,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
