"""Which tokens a rank holds: ranges of global positions, in row order.

A `Layout` travels with every packed activation `[rows, d_model]`. Splitting a batch over the mesh
is arithmetic on layouts: sequences over `dp`, micro-batches over time, tokens over `cp`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Balance = Literal["zigzag", "contiguous"]


class Range(NamedTuple):
    """`length` tokens of one sequence from position `start` on."""

    sequence: int
    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Ranges in the order of a rank's rows; none is empty."""

    ranges: tuple[Range, ...]

    @cached_property
    def rows(self) -> int:
        """Rows of an activation with this layout."""
        return sum(r.length for r in self.ranges)

    @cached_property
    def array(self) -> NDArray[np.int64]:
        """The ranges as int64 `[n, 3]` (sequence, start, length), as kernels take them."""
        return np.array(self.ranges, np.int64).reshape(-1, 3)

    def global_rows(self, lengths: Sequence[int]) -> NDArray[np.int64]:
        """Return each row's index among all tokens of the batch, sequences end to end."""
        offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])
        parts = [np.arange(r.length) + offsets[r.sequence] + r.start for r in self.ranges]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def slice(self, start: int, stop: int) -> Layout:
        """Return the layout of rows `start:stop`."""
        kept, at = [], 0
        for r in self.ranges:
            low, high = max(start - at, 0), min(stop - at, r.length)
            if low < high:
                kept.append(Range(r.sequence, r.start + low, high - low))
            at += r.length
        return Layout(tuple(kept))

    def cut(self, length: int) -> list[Range]:
        """Return the ranges cut wherever a position is a multiple of `length`."""
        cuts = []
        for r in self.ranges:
            for start in range(r.start // length * length, r.start + r.length, length):
                first, last = max(start, r.start), min(start + length, r.start + r.length)
                cuts.append(Range(r.sequence, first, last - first))
        return cuts

    def then(self, other: Layout) -> Layout:
        """Return this layout followed by `other`; ranges that continue each other become one."""
        ranges = list(self.ranges)
        for r in other.ranges:
            last = ranges[-1] if ranges else None
            if last and last.sequence == r.sequence and last.start + last.length == r.start:
                ranges[-1] = Range(last.sequence, last.start, last.length + r.length)
            else:
                ranges.append(r)
        return Layout(tuple(ranges))

    def sequence_ends(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Return (sequence, row) of every row that holds the last token of its sequence."""
        found, at = [], 0
        for r in self.ranges:
            at += r.length
            if r.start + r.length == lengths[r.sequence]:
                found.append((r.sequence, at - 1))
        return found


def split(total: int, parts: int) -> list[tuple[int, int]]:
    """Return `parts` contiguous (start, stop) of 0..total; the first ones are one longer."""
    small, extra = divmod(total, parts)
    bounds = [i * small + min(i, extra) for i in range(parts + 1)]
    return list(itertools.pairwise(bounds))


def split_batch(lengths: Sequence[int], parts: int) -> list[Layout]:
    """Split a batch into contiguous groups of whole sequences, one for each `dp` coordinate."""
    return [
        Layout(tuple(Range(s, 0, lengths[s]) for s in range(*bounds) if lengths[s] > 0))
        for bounds in split(len(lengths), parts)
    ]


def split_micro_batches(layout: Layout, parts: int) -> list[Layout]:
    """Split rows over time: whole sequences if there are enough of them, else token chunks."""
    if parts <= len(layout.ranges):
        return [Layout(layout.ranges[a:b]) for a, b in split(len(layout.ranges), parts)]
    return [layout.slice(a, b) for a, b in split(layout.rows, parts)]


def streams_tokens(layout: Layout, micro_batches: int) -> bool:
    """Tell whether `split_micro_batches` cuts sequences, so that K/V must be kept."""
    return micro_batches > max(len(layout.ranges), 1)


def split_tokens(layout: Layout, parts: int, balance: Balance) -> list[Layout]:
    """Split the tokens of every range over `cp`.

    Contiguous: rank r takes the r-th of `parts` chunks. Zigzag: rank r takes chunks r and
    2·parts-1-r of 2·parts, which evens out causal work (Brandon et al. 2023; Llama 3 report).
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


def groups_span(layouts: Sequence[Layout], length: int) -> bool:
    """Tell whether some group of `length` positions has rows in more than one layout."""
    keys = [{(r.sequence, r.start // length) for r in layout.cut(length)} for layout in layouts]
    return sum(map(len, keys)) > len(set().union(*keys))
