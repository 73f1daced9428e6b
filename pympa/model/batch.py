"""The batch of one rank: micro-batches, their token ids, and which micro-batches do equal work."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pympa.plan.layout import (
    Bounds,
    Layout,
    Piece,
    Range,
    sequence_starts,
    split_batch,
    split_micro_batches,
    split_tokens,
    streams_tokens,
)
from pympa.plan.mesh import Mesh, Plan

_Layouts = tuple[tuple[Layout, ...], ...]
"""The layouts of one micro-batch, by `dp` group and `cp` rank."""

_WorkShape = tuple[tuple[int, int], ...]
"""A key that is equal for micro-batches with equal work; see `_work_shapes`."""


@dataclass(frozen=True)
class QueryParts:
    """The parts of the queries that each rank of `dim` attends with.

    Attributes:
        order: the rows sorted by part, the first rank's part first, int32.
        inverse: the index of each row in that order, int32.
        rows: the number of rows of each rank's part.
        position_rows: the `MicroBatch.position_rows` of this rank's part, int32.
    """

    order: NDArray[np.int32]
    inverse: NDArray[np.int32]
    rows: tuple[int, ...]
    position_rows: NDArray[np.int32]


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of this rank.

    Attributes:
        layouts: the layout of each `cp` rank.
        index: the index of this rank among them.
        ids: the token id of each of this rank's rows, int32.
        position_rows: the index of each row's position in `Batch.positions`, int32.
        last_rows: the rows with the last token of their sequence, int32.
        last_layout: the positions of these tokens.
        lengths: the number of tokens of each sequence of the whole batch.
        most_rows: the largest number of rows of any rank in this micro-batch.
        queries: the layout of the queries with which each `cp` rank attends: all its rows, or its
            part of them if `dim` splits them.
        query_parts: the parts of the queries; None if every rank attends with all its rows.
        exchange: the number of neighbours of `cp` that exchange heads for tokens.
        kind: a number; micro-batches of the same kind do the same work on different data, on all
            ranks.
    """

    layouts: tuple[Layout, ...]
    index: int
    ids: NDArray[np.int32]
    position_rows: NDArray[np.int32]
    last_rows: NDArray[np.int32]
    last_layout: Layout
    lengths: tuple[int, ...]
    most_rows: int
    queries: tuple[Layout, ...]
    query_parts: QueryParts | None
    exchange: int
    kind: int

    @property
    def layout(self) -> Layout:
        """The layout of this rank."""
        return self.layouts[self.index]

    @property
    def ring_index(self) -> int:
        """The index of this rank in its ring."""
        return self.index // self.exchange

    @cached_property
    def ring_queries(self) -> list[Layout]:
        """The layout of the queries of each rank of the ring."""
        return self._grouped(self.queries)

    @cached_property
    def ring_keys(self) -> list[Layout]:
        """The layout of the keys of each rank of the ring."""
        return self._grouped(self.layouts)

    @cached_property
    def sequences(self) -> frozenset[int]:
        """The sequences of which some rank of `cp` has rows."""
        return frozenset(r.sequence for layout in self.layouts for r in layout.ranges)

    def group_rows(self, layouts: Sequence[Layout]) -> list[int]:
        """Return the number of rows of each rank that exchanges heads for tokens with this one."""
        first = self.ring_index * self.exchange
        return [layout.rows for layout in layouts[first : first + self.exchange]]

    def _grouped(self, layouts: Sequence[Layout]) -> list[Layout]:
        if self.exchange == 1:
            return list(layouts)
        groups = range(0, len(layouts), self.exchange)
        return [Layout(()).then(*layouts[first : first + self.exchange]) for first in groups]


@dataclass(frozen=True)
class Batch:
    """The batch of one rank.

    Attributes:
        lengths: the number of tokens of each sequence of the whole batch.
        micro_batches: the micro-batches, in order.
        keeps_kv: whether micro-batches cut sequences, so that K/V of earlier ones are kept.
        positions: the positions of this rank's rows, sorted, each once.
    """

    lengths: tuple[int, ...]
    micro_batches: tuple[MicroBatch, ...]
    keeps_kv: bool
    positions: NDArray[np.int64]


def lay_out_batch(
    mesh: Mesh, ids: Sequence[NDArray[np.int32]], micro_batches: int, *, dry: bool = False
) -> Batch:
    """Split sequences of token ids over the mesh, for one rank.

    Args:
        mesh: the rank's coordinates.
        ids: the token ids of each sequence.
        micro_batches: the number of micro-batches.
        dry: whether only shapes count, so that arrays with an element for each row have no memory.
    """
    plan, index = mesh.plan, mesh.coordinate("cp")
    lengths = tuple(len(sequence) for sequence in ids)
    group = mesh.coordinate("dp")
    layouts_of, kinds = _split_over_ranks(plan, lengths, micro_batches)
    own_group = [layouts[group] for layouts in layouts_of]
    most_rows = [
        max(layout.rows for of_group in layouts for layout in of_group) for layouts in layouts_of
    ]
    coordinate, starts = mesh.coordinate("dim"), sequence_starts(lengths)
    pieces = [piece for layouts in own_group for piece in layouts[index].pieces.values()]
    positions = _union(pieces, dry=dry)

    def tokens(layout: Layout) -> NDArray[np.int32]:
        if dry:
            return np.broadcast_to(np.int32(0), (layout.rows,))
        return _joined([ids[r.sequence][r.start : r.start + r.length] for r in layout.ranges])

    def position_rows(layout: Layout) -> NDArray[np.int32]:
        if dry:
            return np.broadcast_to(np.int32(0), (layout.rows,))
        firsts = np.searchsorted(positions, [r.start for r in layout.ranges])
        counts = (r.length for r in layout.ranges)
        return _joined([a + np.arange(n) for a, n in zip(firsts, counts, strict=True)])

    def micro_batch(layouts: tuple[Layout, ...], most_rows: int, kind: int) -> MicroBatch:
        layout = layouts[index]
        ends = layout.sequence_ends(lengths)
        queries, query_parts = layouts, None
        if plan.splits_queries:
            split_queries = [split_tokens(part, plan.dim, plan.balance) for part in layouts]
            queries = tuple(parts[coordinate] for parts in split_queries)
            order = _order(layout, split_queries[index], starts, dry=dry)
            query_parts = QueryParts(
                order,
                order if dry else np.argsort(order).astype(np.int32),
                tuple(part.rows for part in split_queries[index]),
                position_rows(queries[index]),
            )
        return MicroBatch(
            layouts,
            index,
            tokens(layout),
            position_rows(layout),
            np.array([row for _, row in ends], np.int32),
            Layout(tuple(Range(sequence, lengths[sequence] - 1, 1) for sequence, _ in ends)),
            lengths,
            most_rows,
            queries,
            query_parts,
            plan.head_exchange,
            kind,
        )

    keeps_kv = streams_tokens(split_batch(lengths, plan.dp)[group], micro_batches)
    micro_batched = tuple(map(micro_batch, own_group, most_rows, kinds))
    return Batch(lengths, micro_batched, keeps_kv, positions)


class _Split(NamedTuple):
    """The layouts of all ranks by micro-batch, and the kind of each micro-batch."""

    layouts: tuple[_Layouts, ...]
    kinds: tuple[int, ...]


@lru_cache(maxsize=4)
def _split_over_ranks(plan: Plan, lengths: tuple[int, ...], micro_batches: int) -> _Split:
    """Split a batch over micro-batches, `dp` groups and `cp` ranks.

    The ranks of a process share the result: a thousand virtual ranks would store a million layouts.
    """
    groups = split_batch(lengths, plan.dp)
    parts = [split_micro_batches(group, micro_batches) for group in groups]
    layouts = tuple(
        tuple(tuple(split_tokens(part, plan.cp, plan.balance)) for part in of_groups)
        for of_groups in zip(*parts, strict=True)
    )
    shapes = zip(*(_work_shapes(group) for group in zip(*layouts, strict=True)), strict=True)
    first: dict[tuple[_WorkShape, ...], int] = {}
    return _Split(layouts, tuple(first.setdefault(shape, i) for i, shape in enumerate(shapes)))


def _work_shapes(micro_batches: Sequence[tuple[Layout, ...]]) -> list[_WorkShape]:
    """Return a key for each micro-batch of a group of sequences; equal work has equal keys.

    The key has, for each sequence whose keys may be visible, a number and the count of
    micro-batches since the sequence began. Sequences with the same split over ranks and time have
    the same number.

    Args:
        micro_batches: the layout of each `cp` rank, by micro-batch.
    """
    pieces_of: dict[int, list[tuple[int, int, int, int]]] = {}
    lowest: list[int] = []  # the first sequence of each micro-batch; they are in order
    for index, layouts in enumerate(micro_batches):
        lowest.append(min((r.sequence for layout in layouts for r in layout.ranges), default=0))
        for rank, layout in enumerate(layouts):
            for sequence, start, length in layout.ranges:
                pieces_of.setdefault(sequence, []).append((index, rank, start, length))
    first = {sequence: pieces[0][0] for sequence, pieces in pieces_of.items()}
    numbers: dict[Hashable, int] = {}
    number = {
        sequence: numbers.setdefault(
            tuple((index - first[sequence], *piece) for index, *piece in pieces), len(numbers)
        )
        for sequence, pieces in pieces_of.items()
    }
    shapes = []
    for index, layouts in enumerate(micro_batches):
        last = max((r.sequence for layout in layouts for r in layout.ranges), default=-1)
        # Ranks that exchange heads have kept their keys since the first of these sequences began.
        since = lowest[first.get(lowest[index], index)]
        visible = (s for s in range(since, last + 1) if s in first)
        shapes.append(tuple((number[s], index - first[s]) for s in visible))
    return shapes


def _union(pieces_of: Sequence[Sequence[Piece]], *, dry: bool) -> NDArray[np.int64]:
    """Return the positions that some (start, length) covers, sorted, each once, int64."""
    found: list[Bounds] = []
    end = 0
    for start, length in sorted({piece for pieces in pieces_of for piece in pieces}):
        if start + length > end:
            found.append((max(start, end), start + length))
        end = max(end, start + length)
    if dry:
        return np.broadcast_to(np.int64(0), (sum(last - first for first, last in found),))
    return _joined([np.arange(*bounds) for bounds in found], np.int64)


def _order(
    layout: Layout, parts: Sequence[Layout], starts: NDArray[np.int64], *, dry: bool
) -> NDArray[np.int32]:
    """Return the rows of a layout in the order of its parts, one after the other."""
    if dry:
        return np.broadcast_to(np.int32(0), (layout.rows,))
    rows = layout.rows_from(starts)
    sorting = np.argsort(rows)
    wanted = _joined([part.rows_from(starts) for part in parts], np.int64)
    return sorting[np.searchsorted(rows, wanted, sorter=sorting)].astype(np.int32)


def _joined(parts: Sequence[NDArray[Any]], dtype: type[Any] = np.int32) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)
