"""A batch as one rank sees it: micro-batches, their token ids, and kept keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Arena, Array
from pympa.kernels import KvBlock
from pympa.layout import Layout, split_batch, split_micro_batches, split_tokens, streams_tokens
from pympa.mesh import Mesh, Plan


@dataclass(frozen=True)
class QueryParts:
    """How the ranks of `dim` share the queries of their common rows.

    Attributes:
        order: the rows, those of the first rank's part first, int32.
        places: where each row is in that order, int32.
        rows: of each rank's part. mine: this rank's part of `order`.
    """

    order: NDArray[np.int32]
    places: NDArray[np.int32]
    rows: tuple[int, ...]
    mine: slice


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

    @property
    def layout(self) -> Layout:
        """This rank's layout."""
        return self.layouts[self.index]

    @property
    def ring_index(self) -> int:
        """This rank's place in its ring."""
        return self.index // self.exchange

    @property
    def ring_queries(self) -> list[Layout]:
        """Layout of the queries of each rank of the ring."""
        return self._grouped(self.queries)

    @property
    def ring_keys(self) -> list[Layout]:
        """Layout of the keys of each rank of the ring."""
        return self._grouped(self.layouts)

    def group_rows(self, layouts: Sequence[Layout]) -> list[int]:
        """Return the rows of each rank that this one exchanges heads for tokens with."""
        first = self.ring_index * self.exchange
        return [layout.rows for layout in layouts[first : first + self.exchange]]

    def _grouped(self, layouts: Sequence[Layout]) -> list[Layout]:
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


def lay_out_batch(mesh: Mesh, ids: Sequence[NDArray[np.int32]], micro_batches: int) -> Batch:
    """Split sequences of token ids over the mesh, as the rank at `mesh` sees them."""
    plan, index = mesh.plan, mesh.coordinate("cp")
    lengths = tuple(len(sequence) for sequence in ids)
    groups = split_batch(lengths, plan.dp)
    mine = groups[mesh.coordinate("dp")]
    parts = [split_micro_batches(group, micro_batches) for group in groups]
    shares = [
        tuple(split_tokens(part, plan.cp, plan.balance)) for part in parts[mesh.coordinate("dp")]
    ]
    most_rows = [
        max(share.rows for part in turn for share in split_tokens(part, plan.cp, plan.balance))
        for turn in zip(*parts, strict=True)
    ]
    coordinate = mesh.coordinate("dim")
    spans = {(r.start, r.length) for share in shares for r in share[index].ranges}
    positions = np.unique(_joined([np.arange(a, a + n) for a, n in spans], np.int64))

    def micro_batch(layouts: tuple[Layout, ...], most_rows: int) -> MicroBatch:
        layout = layouts[index]
        ends = layout.sequence_ends(lengths)
        tokens = [ids[r.sequence][r.start : r.start + r.length] for r in layout.ranges]
        rows = [np.searchsorted(positions, r.start) + np.arange(r.length) for r in layout.ranges]
        return MicroBatch(
            layouts,
            index,
            _joined(tokens, np.int32),
            _joined(rows, np.int32),
            np.array([row for _, row in ends], np.int32),
            tuple(sequence for sequence, _ in ends),
            lengths,
            most_rows,
            tuple(_query_layouts(plan, layout)[coordinate] for layout in layouts),
            _query_parts(plan, layout, lengths, coordinate),
            plan.head_exchange,
        )

    keeps_kv = streams_tokens(mine, micro_batches)
    micro_batched = tuple(map(micro_batch, shares, most_rows))
    return Batch(lengths, micro_batched, keeps_kv, positions)


def _query_layouts(plan: Plan, layout: Layout) -> list[Layout]:
    """Return the queries that each `dim` rank attends with, of rows that they all have."""
    if plan.splits_queries:
        return split_tokens(layout, plan.dim, plan.balance)
    return [layout] * plan.dim


def _query_parts(
    plan: Plan, layout: Layout, lengths: Sequence[int], coordinate: int
) -> QueryParts | None:
    if not plan.splits_queries:
        return None
    parts = split_tokens(layout, plan.dim, plan.balance)
    rows = layout.global_rows(lengths)
    sorting = np.argsort(rows)
    wanted = _joined([part.global_rows(lengths) for part in parts], np.int64)
    order = sorting[np.searchsorted(rows, wanted, sorter=sorting)].astype(np.int32)
    places = np.argsort(order).astype(np.int32)
    counts = tuple(part.rows for part in parts)
    first = sum(counts[:coordinate])
    return QueryParts(order, places, counts, slice(first, first + counts[coordinate]))


def _joined(parts: Sequence[NDArray[Any]], dtype: type[Any]) -> NDArray[Any]:
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
        self.layouts = [
            kept.then(new) for kept, new in zip(self.layouts, part.ring_keys, strict=True)
        ]
        last = self.layouts[index].rows
        return self._k[first:last], self._v[first:last]

    def block(self, index: int) -> KvBlock:
        """Return everything kept by rank `index`, this one."""
        rows = self.layouts[index].rows
        return KvBlock(self._k[:rows], self._v[:rows], self.layouts[index])
