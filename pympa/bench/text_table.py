"""Tables as plain text: on a narrow terminal in several parts, and no number is ever cut.

No colours and no other codes either: what a rank takes for a terminal may be a launcher's, whose
output goes to a file.
"""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pympa.text import shown

_WIDTH_WITHOUT_TERMINAL = 176
_MARGIN, _GAP = "  ", "   "
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
        return max(map(_width, lines))

    def least(self) -> int:
        """Return the width below which a word or a number would be cut."""
        lines = [line for cell in self.cells for line in cell]
        words = [*self.heading.split(), *(" ".join(lines).split() if self.text else lines)]
        return max(map(_width, words), default=0)

    def wrapped(self, lines: Sequence[str], width: int) -> list[str]:
        """Return lines of a cell, each as wide as the column."""
        parts = [p for line in lines for p in (_wrap(line, width) if self.text else [line])]
        return [self.justified(part, width) for part in parts]

    def justified(self, line: str, width: int) -> str:
        """Return a line that fills the column."""
        space = " " * (width - _width(line))
        return line + space if self.text else space + line


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
        for line in self.title.split("\n") if self.title else []:
            yield from _wrap(line, width)
        parts = self._parts(width)
        for number, part in enumerate(parts or []):
            if number or self.title:
                yield ""
            yield from _drawn(part, width)
        if parts is None:
            yield from self._blocks(width)
        if self.caption:
            yield ""
            for line in self.caption.split("\n"):
                yield from _wrap(line, width)

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
                first, *rest = _wrap(text, width - 4) or [""]
                yield first if index < self._keys else _MARGIN + first
                yield from (2 * _MARGIN + line for line in rest)


def show(table: Table) -> None:
    """Print a table, as wide as the terminal, or wide where there is none."""
    width = _WIDTH_WITHOUT_TERMINAL
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    text = "\n".join(line.rstrip() for line in table.lines(width))
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def _least(columns: Sequence[_Column]) -> int:
    return len(_MARGIN) + 1 + sum(c.least() for c in columns) + len(_GAP) * (len(columns) - 1)


def _drawn(columns: Sequence[_Column], width: int) -> Iterator[str]:
    """Yield the lines of columns side by side."""
    widths = [column.least() for column in columns]
    free, full = width - _least(columns), [column.full() for column in columns]
    while free > 0 and widths != full:
        for index, wanted in enumerate(full):
            if widths[index] < wanted and free > 0:
                widths[index] += 1
                free -= 1
    if any(column.heading for column in columns):
        headings = [
            [c.justified(part, w) for line in c.heading.split("\n") for part in _wrap(line, w)]
            for c, w in zip(columns, widths, strict=True)
        ]
        yield from _side_by_side(headings, widths, at_bottom=True)
        yield " " + "─" * (sum(widths) + len(_GAP) * (len(columns) - 1) + 2)
    for row in range(len(columns[0].cells)):
        cells = [c.wrapped(c.cells[row], w) for c, w in zip(columns, widths, strict=True)]
        yield from _side_by_side(cells, widths)


def _side_by_side(
    cells: Sequence[Sequence[str]], widths: Sequence[int], *, at_bottom: bool = False
) -> Iterator[str]:
    height = max(map(len, cells))
    filled = []
    for cell, width in zip(cells, widths, strict=True):
        empty = [" " * width] * (height - len(cell))
        filled.append([*empty, *cell] if at_bottom else [*cell, *empty])
    for lines in zip(*filled, strict=True):
        yield _MARGIN + _GAP.join(lines)


def _wrap(line: str, width: int) -> list[str]:
    """Break a line between words; a word that is wider than a line stays whole."""
    lines: list[str] = []
    for word in line.split(" "):
        if lines and _width(lines[-1]) + 1 + _width(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)
