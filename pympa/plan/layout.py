"""The tokens of a rank: ranges of global positions, in row order.

Every packed activation `[rows, d_model]` has a `Layout`. Splitting a batch over the mesh is
arithmetic on layouts: sequences over `dp`, micro-batches over time, tokens over `cp`.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Balance = Literal["zigzag", "contiguous"]
Bounds = tuple[int, int]
"""(start, stop) of consecutive items: rows, columns, heads, layers."""

Piece = tuple[int, int]
"""(start, length) of consecutive positions of a sequence."""


class Range(NamedTuple):
    """`length` tokens of one sequence from position `start` on."""

    sequence: int
    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Ranges in the order of a rank's rows; no range is empty."""

    ranges: tuple[Range, ...]

    def __hash__(self) -> int:
        """Return a hash that is computed once: layouts of many ranges are often looked up."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.ranges)

    @cached_property
    def rows(self) -> int:
        """The number of rows of an activation with this layout."""
        return self._ends[-1] if self.ranges else 0

    @cached_property
    def _ends(self) -> list[int]:
        """The end of each range, as a row."""
        return [*itertools.accumulate(r.length for r in self.ranges)]

    @cached_property
    def array(self) -> NDArray[np.int64]:
        """The ranges as int64 `[n, 3]` (sequence, start, length), the form that kernels take."""
        return np.array(self.ranges, np.int64).reshape(-1, 3)

    @cached_property
    def key_ranges(self) -> NDArray[np.int64]:
        """The ranges with the first row of each, int64 `[n, 4]`, as kernels take for keys."""
        first_rows = np.array([0, *self._ends][: len(self.ranges)], np.int64)
        return np.column_stack([self.array, first_rows])

    @cached_property
    def pieces(self) -> dict[int, tuple[Piece, ...]]:
        """The ranges of each sequence."""
        found: dict[int, list[Piece]] = {}
        for sequence, start, length in self.ranges:
            found.setdefault(sequence, []).append((start, length))
        return {sequence: tuple(pieces) for sequence, pieces in found.items()}

    def by_sequence(self) -> dict[int, Bounds] | None:
        """Return the rows of each sequence, in order; None if some are not consecutive."""
        found: dict[int, Bounds] = {}
        at = 0
        for sequence, group in itertools.groupby(self.ranges, lambda r: r.sequence):
            if sequence in found:
                return None
            found[sequence] = at, at + sum(r.length for r in group)
            at = found[sequence][1]
        return found

    def global_rows(self, lengths: Sequence[int]) -> NDArray[np.int64]:
        """Return each row's index among all tokens of the batch, one sequence after the other."""
        return self.rows_from(sequence_starts(lengths))

    def rows_from(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return each row's index among all tokens, given the start of each sequence."""
        parts = [np.arange(r.length) + starts[r.sequence] + r.start for r in self.ranges]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def slice(self, start: int, stop: int) -> Layout:
        """Return the layout of rows `start:stop`."""
        if start <= 0 and stop >= self.rows:
            return self
        kept: list[Range] = []
        for index in range(bisect_right(self._ends, max(start, 0)), len(self.ranges)):
            r = self.ranges[index]
            at = self._ends[index] - r.length
            if at >= stop:
                break
            low, high = max(start - at, 0), min(stop - at, r.length)
            if low < high:
                kept.append(Range(r.sequence, r.start + low, high - low))
        return Layout(tuple(kept))

    def since(self, sequences: Container[int]) -> Layout:
        """Return the layout from the first range of one of these sequences on."""
        ranges = enumerate(self.ranges)
        first = next((i for i, r in ranges if r.sequence in sequences), len(self.ranges))
        return Layout(self.ranges[first:]) if first else self

    def cut(self, length: int) -> list[Range]:
        """Return the ranges, cut at positions that are multiples of `length`."""
        cuts = []
        for r in self.ranges:
            for start in range(r.start // length * length, r.start + r.length, length):
                first, last = max(start, r.start), min(start + length, r.start + r.length)
                cuts.append(Range(r.sequence, first, last - first))
        return cuts

    def then(self, *others: Layout) -> Layout:
        """Return this layout and others, one after the other; adjoining ranges become one."""
        ranges = list(self.ranges)
        for r in itertools.chain.from_iterable(other.ranges for other in others):
            last = ranges[-1] if ranges else None
            if last and last.sequence == r.sequence and last.start + last.length == r.start:
                ranges[-1] = Range(last.sequence, last.start, last.length + r.length)
            else:
                ranges.append(r)
        return Layout(tuple(ranges))

    def sequence_ends(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Return (sequence, row) of every row with the last token of its sequence."""
        found, at = [], 0
        for r in self.ranges:
            at += r.length
            if r.start + r.length == lengths[r.sequence]:
                found.append((r.sequence, at - 1))
        return found


def sequence_starts(lengths: Sequence[int]) -> NDArray[np.int64]:
    """Return the index of each sequence's first token among all tokens of a batch."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])[:-1]


def split(total: int, parts: int) -> list[tuple[int, int]]:
    """Return `parts` contiguous (start, stop) of 0..total; the first ones are longer by one."""
    small, extra = divmod(total, parts)
    bounds = [i * small + min(i, extra) for i in range(parts + 1)]
    return list(itertools.pairwise(bounds))


def joined(parts: Sequence[Bounds]) -> list[Bounds]:
    """Return ascending bounds with adjoining ones joined, and without empty ones."""
    found: list[Bounds] = []
    for first, last in parts:
        if found and found[-1][1] == first:
            found[-1] = found[-1][0], last
        elif first < last:
            found.append((first, last))
    return found


def part_of(parts: Sequence[Bounds], first: int, last: int) -> list[Bounds]:
    """Return elements first..last of those in some bounds, counted one after the other."""
    found, at = [], 0
    for start, stop in parts:
        low, high = max(first - at, 0), min(last - at, stop - start)
        if low < high:
            found.append((start + low, start + high))
        at += stop - start
    return found


def split_batch(lengths: Sequence[int], parts: int) -> list[Layout]:
    """Split a batch into contiguous groups of whole sequences, one for each `dp` coordinate."""
    return [
        Layout(tuple(Range(s, 0, lengths[s]) for s in range(*bounds) if lengths[s] > 0))
        for bounds in split(len(lengths), parts)
    ]


def split_micro_batches(layout: Layout, parts: int) -> list[Layout]:
    """Split rows over time: whole sequences if there are enough of them, otherwise token chunks."""
    if parts <= len(layout.ranges):
        return [Layout(layout.ranges[a:b]) for a, b in split(len(layout.ranges), parts)]
    return [layout.slice(a, b) for a, b in split(layout.rows, parts)]


def streams_tokens(layout: Layout, micro_batches: int) -> bool:
    """Return whether `split_micro_batches` cuts sequences, so that K/V must be kept."""
    return micro_batches > max(len(layout.ranges), 1)


def split_tokens(layout: Layout, parts: int, balance: Balance) -> list[Layout]:
    """Split the tokens of every range over `cp`.

    Contiguous: rank r gets the r-th of `parts` chunks. Zigzag: rank r gets chunks r and
    2·parts-1-r of 2·parts, which balances causal work (Brandon et al. 2023; Llama 3 report).
    """
    ranks: list[list[Range]] = [[] for _ in range(parts)]
    for r in layout.ranges:
        chunks = split(r.length, 2 * parts if balance == "zigzag" else parts)
        for index, (low, high) in enumerate(chunks):
            owner = index if index < parts else 2 * parts - 1 - index
            if high > low:
                ranks[owner].append(Range(r.sequence, r.start + low, high - low))
    joined = (Layout(()).then(Layout(tuple(ranges))) for ranges in ranks)
    return list(joined)
