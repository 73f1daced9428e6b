"""Tables as plain text: on a narrow terminal in several parts, and no number is ever cut.

Rich draws them. No colours and no other codes: what a rank takes for a terminal may be a
launcher's, whose output goes to a file.
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

from pympa.text import shown

_WIDTH_WITHOUT_TERMINAL = 176
_MARGIN = "  "
_BETWEEN = 3  # spaces between columns and round them, in this box
Cell = str | Sequence[str]
"""What stands in a row under a heading: a line, or several."""


@dataclass
class _Column:
    """A heading and the lines of each cell below it; text may wrap, numbers stand at the right."""

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
        title: a line above them.
        caption: lines below them.
        keys: how many of the first columns tell rows apart; they are repeated in each part.
    """

    def __init__(self, title: str = "", caption: Sequence[str] = (), keys: int = 1) -> None:
        self.title = shown(title)
        self.caption = "\n".join(map(shown, caption))
        self._keys = keys
        self._columns: list[_Column] = []

    def add_column(self, heading: str, *, text: bool = False) -> None:
        """Add a column of numbers, or of text, which wraps where it must.

        Args:
            heading: lines break where it says so, and where it must.
            text: no numbers.
        """
        self._columns.append(_Column(heading, text))

    def add_row(self, *cells: Cell) -> None:
        """Add a row: for each column a line, or several."""
        for column, cell in zip(self._columns, cells, strict=True):
            column.cells.append([*map(shown, [cell] if isinstance(cell, str) else cell)])

    def lines(self, width: int) -> Iterator[str]:
        """Yield the lines of the table on a terminal of a width, without their ends."""
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
        """Return which columns stand side by side; None if some cannot stand beside the keys."""
        keys, others = self._columns[: self._keys], self._columns[self._keys :]
        parts = [list(keys)]
        for column in others:
            if len(parts[-1]) > len(keys) and _least([*parts[-1], column]) > width:
                parts.append(list(keys))
            parts[-1].append(column)
        return parts if all(_least(part) <= width for part in parts) else None

    def _blocks(self, width: int) -> Iterator[str]:
        """Yield each row as lines of its own, a heading and a cell in each."""
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
    """Print a table, as wide as the terminal, or wide where there is none."""
    width = _WIDTH_WITHOUT_TERMINAL
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    encoding = sys.stdout.encoding or "utf-8"
    text = "\n".join(table.lines(width))
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def _least(columns: Sequence[_Column]) -> int:
    return sum(column.least() + _BETWEEN for column in columns) + 1


def _drawn(columns: Sequence[_Column], width: int) -> list[str]:
    """Return the lines of columns side by side; what they do not need goes to them in turn."""
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
    """Yield lines that break between words only; a word wider than a line stays whole."""
    for line in text.split("\n") if text else []:
        yield from textwrap.wrap(
            line,
            width,
            initial_indent=margin,
            subsequent_indent=after,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
