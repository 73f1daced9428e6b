"""Which tokens a rank holds: ranges of global positions, in row order.

A `Layout` travels with every packed activation `[rows, d_model]`. Splitting a batch over the mesh
is arithmetic on layouts: sequences over `dp`, micro-batches over time, tokens over `cp`.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Balance = Literal["zigzag", "contiguous"]
Span = tuple[int, int]
"""(start, stop)."""


class Range(NamedTuple):
    """`length` tokens of one sequence from position `start` on."""

    sequence: int
    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Ranges in the order of a rank's rows; none is empty."""

    ranges: tuple[Range, ...]

    def __hash__(self) -> int:
        """Return a hash that is computed once: layouts of many ranges are looked up often."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.ranges)

    @cached_property
    def rows(self) -> int:
        """Rows of an activation with this layout."""
        return self._ends[-1] if self.ranges else 0

    @cached_property
    def _ends(self) -> list[int]:
        """The row after each range."""
        return [*itertools.accumulate(r.length for r in self.ranges)]

    @cached_property
    def array(self) -> NDArray[np.int64]:
        """The ranges as int64 `[n, 3]` (sequence, start, length), as kernels take them."""
        return np.array(self.ranges, np.int64).reshape(-1, 3)

    @cached_property
    def spans(self) -> dict[int, tuple[Span, ...]]:
        """(start, length) of the ranges of each sequence."""
        found: dict[int, list[Span]] = {}
        for sequence, start, length in self.ranges:
            found.setdefault(sequence, []).append((start, length))
        return {sequence: tuple(spans) for sequence, spans in found.items()}

    def by_sequence(self) -> dict[int, Span] | None:
        """Return the rows of each sequence, in order; None if some lie in several places."""
        found: dict[int, Span] = {}
        at = 0
        for sequence, group in itertools.groupby(self.ranges, lambda r: r.sequence):
            if sequence in found:
                return None
            found[sequence] = at, at + sum(r.length for r in group)
            at = found[sequence][1]
        return found

    def global_rows(self, lengths: Sequence[int]) -> NDArray[np.int64]:
        """Return each row's index among all tokens of the batch, sequences end to end."""
        return self.rows_from(sequence_starts(lengths))

    def rows_from(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the same, given where each sequence starts among all tokens."""
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
        """Return the layout from the first range on that is of one of these sequences."""
        ranges = enumerate(self.ranges)
        first = next((i for i, r in ranges if r.sequence in sequences), len(self.ranges))
        return Layout(self.ranges[first:]) if first else self

    def cut(self, length: int) -> list[Range]:
        """Return the ranges cut wherever a position is a multiple of `length`."""
        cuts = []
        for r in self.ranges:
            for start in range(r.start // length * length, r.start + r.length, length):
                first, last = max(start, r.start), min(start + length, r.start + r.length)
                cuts.append(Range(r.sequence, first, last - first))
        return cuts

    def then(self, *others: Layout) -> Layout:
        """Return this layout and others, end to end; ranges that go on become one."""
        ranges = list(self.ranges)
        for r in itertools.chain.from_iterable(other.ranges for other in others):
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


def sequence_starts(lengths: Sequence[int]) -> NDArray[np.int64]:
    """Return where each sequence starts among all tokens of a batch, sequences end to end."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])[:-1]


def split(total: int, parts: int) -> list[tuple[int, int]]:
    """Return `parts` contiguous (start, stop) of 0..total; the first ones are one longer."""
    small, extra = divmod(total, parts)
    bounds = [i * small + min(i, extra) for i in range(parts + 1)]
    return list(itertools.pairwise(bounds))


def joined(spans: Sequence[Span]) -> list[Span]:
    """Return ascending spans with those that continue each other made one, and no empty ones."""
    found: list[Span] = []
    for first, last in spans:
        if found and found[-1][1] == first:
            found[-1] = found[-1][0], last
        elif first < last:
            found.append((first, last))
    return found


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


Group = tuple[int, int]
"""A group of consecutive positions: (sequence, number of the group in it)."""


def edge_groups(layout: Layout, length: int) -> Iterator[Group]:
    """Yield the groups of `length` positions that a range of the layout begins or ends in.

    Others lie in one range as a whole.
    """
    for sequence, start, count in layout.ranges:
        yield sequence, start // length
        yield sequence, (start + count - 1) // length


def shared_groups(turns: Sequence[Sequence[Layout]], length: int) -> frozenset[Group]:
    """Return the groups of `length` positions that lie on more than one rank.

    Args:
        turns: layout of each rank, by micro-batch: a group may be on one rank in each of them, and
            on several all the same.
        length: positions of a group.
    """
    holders: dict[Group, set[int]] = {}
    for layouts in turns:
        for rank, layout in enumerate(layouts):
            for group in edge_groups(layout, length):
                holders.setdefault(group, set()).add(rank)
    return frozenset(group for group, ranks in holders.items() if len(ranks) > 1)


KEY_TILE = 512  # keys that the kernels fold together, at multiples of it; part of the bits contract
_TILE_SCORES = 1 << 20  # of a tile whose scores are summed over ranks: 4 MB


class ScoreTile(NamedTuple):
    """Rows of queries and of keys, (start, stop) each, that see each other in part at least.

    The queries are consecutive tokens from position `q_start` on, the keys from `k_start` on.
    """

    rows: Span
    keys: Span
    q_start: int
    k_start: int


def score_tiles(
    q: Layout, k: Layout, heads: int, causal: bool, window: int | None
) -> Iterator[ScoreTile]:
    """Cut attention of queries to keys into tiles, in ascending order of the queries' rows."""
    step = max(1, _TILE_SCORES // (KEY_TILE * heads))
    q_row = 0
    for a in q.ranges:
        k_row = 0
        for b in k.ranges:
            if a.sequence == b.sequence:
                cuts = Layout((Range(a.sequence, b.start, b.length),)).cut(KEY_TILE)
                for first, (_, k_start, length) in itertools.product(
                    range(0, a.length, step), cuts
                ):
                    last = min(first + step, a.length)
                    near = a.start + last - 1 - k_start  # the last query over the first key
                    far = a.start + first - (k_start + length - 1)
                    hidden = causal and near < 0
                    if window is not None:
                        hidden |= far >= window or (not causal and near <= -window)
                    if not hidden:
                        keys = k_row + k_start - b.start
                        yield ScoreTile(
                            (q_row + first, q_row + last),
                            (keys, keys + length),
                            a.start + first,
                            k_start,
                        )
            k_row += b.length
        q_row += a.length
