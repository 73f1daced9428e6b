"""A batch as one rank sees it: micro-batches, their token ids, and kept keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Arena, Array
from pympa.kernels import KvBlock
from pympa.layout import (
    Layout,
    Span,
    split_batch,
    split_micro_batches,
    split_tokens,
    streams_tokens,
)
from pympa.mesh import Mesh, Plan

_Turn = tuple[tuple[Layout, ...], ...]
"""The layouts of one micro-batch, by `dp` group and `cp` rank."""


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
    turns = _split_over_ranks(plan, lengths, micro_batches)
    shares = [turn[group] for turn in turns]
    most_rows = [max(share.rows for part in turn for share in part) for turn in turns]
    coordinate = mesh.coordinate("dim")
    positions = _union([span for share in shares for span in share[index].spans.values()])

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
            order = _order(layout, split_queries[index], lengths, dry=dry)
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
    kinds = range(len(turns)) if keeps_kv else _kinds(turns)
    micro_batched = tuple(map(micro_batch, shares, most_rows, kinds))
    return Batch(lengths, micro_batched, keeps_kv, positions)


@lru_cache(maxsize=4)
def _split_over_ranks(
    plan: Plan, lengths: tuple[int, ...], micro_batches: int
) -> tuple[_Turn, ...]:
    """Return the layout of each `cp` rank of each `dp` group, by micro-batch.

    The ranks of a process share them: a thousand virtual ranks would hold a million.
    """
    groups = split_batch(lengths, plan.dp)
    parts = [split_micro_batches(group, micro_batches) for group in groups]
    return tuple(
        tuple(tuple(split_tokens(part, plan.cp, plan.balance)) for part in turn)
        for turn in zip(*parts, strict=True)
    )


def _kinds(turns: Sequence[_Turn]) -> list[int]:
    """Return a number for each micro-batch, the same for those that differ in sequences only."""
    shapes = [
        tuple(tuple(tuple(layout.spans.values()) for layout in group) for group in turn)
        for turn in turns
    ]
    first = {shape: index for index, shape in reversed([*enumerate(shapes)])}
    return [first[shape] for shape in shapes]


def _union(spans_of: Sequence[Sequence[Span]]) -> NDArray[np.int64]:
    """Return the positions that some (start, length) covers, sorted, each once, int64."""
    parts, end = [], 0
    for start, length in sorted({span for spans in spans_of for span in spans}):
        parts.append(np.arange(max(start, end), max(start + length, end)))
        end = max(end, start + length)
    return _joined(parts, np.int64)


def _order(
    layout: Layout, parts: Sequence[Layout], lengths: Sequence[int], *, dry: bool
) -> NDArray[np.int32]:
    """Return the rows of a layout in the order of its parts, one after the other."""
    if dry:
        return np.broadcast_to(np.int32(0), (layout.rows,))
    rows = layout.global_rows(lengths)
    sorting = np.argsort(rows)
    wanted = _joined([part.global_rows(lengths) for part in parts], np.int64)
    return sorting[np.searchsorted(rows, wanted, sorter=sorting)].astype(np.int32)


def _joined(parts: Sequence[NDArray[Any]], dtype: type[Any] = np.int32) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)


class KvCache:
    """Keys and values of one layer, with a fixed capacity, and the layout of every ring rank.

    Args:
        arena: memory.
        capacity: rows of this rank.
        k_shape: (kv heads, head_dim). v_shape: (kv heads, v_head_dim).
        dtype: of keys and values.
        ranks: ranks of the ring.
        shared: other ranks may read them.
    """

    def __init__(
        self,
        arena: Arena,
        capacity: int,
        k_shape: tuple[int, int],
        v_shape: tuple[int, int],
        dtype: np.dtype[np.generic],
        ranks: int,
        *,
        shared: bool,
    ) -> None:
        self._k = arena.empty((capacity, *k_shape), dtype, "keys/values", shared=shared)
        self._v = arena.empty((capacity, *v_shape), dtype, "keys/values", shared=shared)
        self.layouts = [Layout(())] * ranks

    def append(self, part: MicroBatch) -> tuple[Array, Array]:
        """Return the rows of k and v that the micro-batch's keys and values go to."""
        index = part.ring_index
        first = self.layouts[index].rows
        pairs = zip(self.layouts, part.ring_keys, strict=True)
        self.layouts = [kept.then(new) if kept.ranges else new for kept, new in pairs]
        last = self.layouts[index].rows
        return self._k[first:last], self._v[first:last]

    def block(self, index: int) -> KvBlock:
        """Return everything kept by rank `index`, this one."""
        rows = self.layouts[index].rows
        return KvBlock(self._k[:rows], self._v[:rows], self.layouts[index])
