"""A batch as one rank sees it: micro-batches, their token ids, and which of them are alike."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pympa.layout import (
    Layout,
    Span,
    sequence_starts,
    split_batch,
    split_micro_batches,
    split_tokens,
    streams_tokens,
)
from pympa.mesh import Mesh, Plan

_Turn = tuple[tuple[Layout, ...], ...]
"""The layouts of one micro-batch, by `dp` group and `cp` rank."""

_Shape = tuple[tuple[int, int], ...]
"""Of a micro-batch, see `_shapes`."""


@dataclass(frozen=True)
class QueryParts:
    """How the ranks of `dim` share the queries of their common rows.

    Attributes:
        order: the rows, those of the first rank's part first, int32.
        places: where each row is in that order, int32.
        rows: of each rank's part.
        position_rows: `MicroBatch.position_rows` of this rank's part, int32.
    """

    order: NDArray[np.int32]
    places: NDArray[np.int32]
    rows: tuple[int, ...]
    position_rows: NDArray[np.int32]


@dataclass(frozen=True)
class MicroBatch:
    """One part in time of this rank's batch.

    Attributes:
        layouts: layout of each `cp` rank. index: this rank's among them.
        ids: token id of each of this rank's rows, int32.
        position_rows: index of each row's position in `Batch.positions`, int32.
        last_rows: rows that hold the last token of their sequence, int32.
        last_sequences: which sequences these end.
        lengths: tokens of each sequence of the whole batch.
        most_rows: rows of the rank that has most of them in this micro-batch.
        queries: layout of the queries that each `cp` rank attends with: all its rows, or its part
            of them where `dim` shares them. query_parts: these parts, or None.
        exchange: neighbours of `cp` that exchange heads for tokens.
        kind: those of one kind are the same work on other data, on all ranks.
    """

    layouts: tuple[Layout, ...]
    index: int
    ids: NDArray[np.int32]
    position_rows: NDArray[np.int32]
    last_rows: NDArray[np.int32]
    last_sequences: tuple[int, ...]
    lengths: tuple[int, ...]
    most_rows: int
    queries: tuple[Layout, ...]
    query_parts: QueryParts | None
    exchange: int
    kind: int

    @property
    def layout(self) -> Layout:
        """This rank's layout."""
        return self.layouts[self.index]

    @property
    def ring_index(self) -> int:
        """This rank's place in its ring."""
        return self.index // self.exchange

    @cached_property
    def ring_queries(self) -> list[Layout]:
        """Layout of the queries of each rank of the ring."""
        return self._grouped(self.queries)

    @cached_property
    def ring_keys(self) -> list[Layout]:
        """Layout of the keys of each rank of the ring."""
        return self._grouped(self.layouts)

    @cached_property
    def sequences(self) -> frozenset[int]:
        """Those that some rank of `cp` has rows of."""
        return frozenset(r.sequence for layout in self.layouts for r in layout.ranges)

    def group_rows(self, layouts: Sequence[Layout]) -> list[int]:
        """Return the rows of each rank that this one exchanges heads for tokens with."""
        first = self.ring_index * self.exchange
        return [layout.rows for layout in layouts[first : first + self.exchange]]

    def _grouped(self, layouts: Sequence[Layout]) -> list[Layout]:
        if self.exchange == 1:
            return list(layouts)
        groups = range(0, len(layouts), self.exchange)
        return [Layout(()).then(*layouts[first : first + self.exchange]) for first in groups]


@dataclass(frozen=True)
class Batch:
    """A batch as one rank sees it.

    Attributes:
        lengths: tokens of each sequence of the whole batch.
        micro_batches: in order of time.
        keeps_kv: micro-batches cut sequences, so K/V of earlier ones are kept.
        positions: the positions that this rank's rows have, sorted, each once.
    """

    lengths: tuple[int, ...]
    micro_batches: tuple[MicroBatch, ...]
    keeps_kv: bool
    positions: NDArray[np.int64]


def lay_out_batch(
    mesh: Mesh, ids: Sequence[NDArray[np.int32]], micro_batches: int, *, dry: bool = False
) -> Batch:
    """Split sequences of token ids over the mesh, as the rank at `mesh` sees them.

    Args:
        mesh: the rank's place.
        ids: of each sequence.
        micro_batches: parts in time.
        dry: only shapes count, so arrays with an element for each row have no memory.
    """
    plan, index = mesh.plan, mesh.coordinate("cp")
    lengths = tuple(len(sequence) for sequence in ids)
    group = mesh.coordinate("dp")
    turns, kinds = _split_over_ranks(plan, lengths, micro_batches)
    shares = [turn[group] for turn in turns]
    most_rows = [max(share.rows for part in turn for share in part) for turn in turns]
    coordinate, starts = mesh.coordinate("dim"), sequence_starts(lengths)
    spans = [span for share in shares for span in share[index].spans.values()]
    positions = _union(spans, dry=dry)

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
            tuple(sequence for sequence, _ in ends),
            lengths,
            most_rows,
            queries,
            query_parts,
            plan.head_exchange,
            kind,
        )

    keeps_kv = streams_tokens(split_batch(lengths, plan.dp)[group], micro_batches)
    micro_batched = tuple(map(micro_batch, shares, most_rows, kinds))
    return Batch(lengths, micro_batched, keeps_kv, positions)


class _Split(NamedTuple):
    """Layouts of all ranks by micro-batch, and the kind of each micro-batch."""

    turns: tuple[_Turn, ...]
    kinds: tuple[int, ...]


@lru_cache(maxsize=4)
def _split_over_ranks(plan: Plan, lengths: tuple[int, ...], micro_batches: int) -> _Split:
    """Split a batch over micro-batches, `dp` groups and `cp` ranks.

    The ranks of a process share it: a thousand virtual ranks would hold a million layouts.
    """
    groups = split_batch(lengths, plan.dp)
    parts = [split_micro_batches(group, micro_batches) for group in groups]
    turns = tuple(
        tuple(tuple(split_tokens(part, plan.cp, plan.balance)) for part in turn)
        for turn in zip(*parts, strict=True)
    )
    shapes = zip(*(_shapes(group) for group in zip(*turns, strict=True)), strict=True)
    first: dict[tuple[_Shape, ...], int] = {}
    return _Split(turns, tuple(first.setdefault(shape, i) for i, shape in enumerate(shapes)))


def _shapes(turns: Sequence[tuple[Layout, ...]]) -> list[_Shape]:
    """Return what tells the work of one group's micro-batches apart.

    For each sequence whose keys may be at hand: how it lies over ranks and time, which is one
    number for those that lie alike, and how far it has got.
    """
    met: dict[int, list[tuple[int, int, int, int]]] = {}
    lowest: list[int] = []  # sequence of each micro-batch; they come in order
    for turn, layouts in enumerate(turns):
        lowest.append(min((r.sequence for part in layouts for r in part.ranges), default=0))
        for rank, layout in enumerate(layouts):
            for sequence, start, length in layout.ranges:
                met.setdefault(sequence, []).append((turn, rank, start, length))
    first = {sequence: places[0][0] for sequence, places in met.items()}
    numbers: dict[Hashable, int] = {}
    number = {
        sequence: numbers.setdefault(
            tuple((turn - first[sequence], *place) for turn, *place in places), len(numbers)
        )
        for sequence, places in met.items()
    }
    shapes = []
    for turn, layouts in enumerate(turns):
        last = max((r.sequence for part in layouts for r in part.ranges), default=-1)
        # A group of ranks that exchange heads has kept its keys since the first of these began.
        since = lowest[first.get(lowest[turn], turn)]
        at_hand = (s for s in range(since, last + 1) if s in first)
        shapes.append(tuple((number[s], turn - first[s]) for s in at_hand))
    return shapes


def _union(spans_of: Sequence[Sequence[Span]], *, dry: bool) -> NDArray[np.int64]:
    """Return the positions that some (start, length) covers, sorted, each once, int64."""
    found: list[Span] = []  # (first, last + 1)
    end = 0
    for start, length in sorted({span for spans in spans_of for span in spans}):
        if start + length > end:
            found.append((max(start, end), start + length))
        end = max(end, start + length)
    if dry:
        return np.broadcast_to(np.int64(0), (sum(last - first for first, last in found),))
    return _joined([np.arange(*span) for span in found], np.int64)


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
