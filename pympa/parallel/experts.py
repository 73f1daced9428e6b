"""Expert parallelism (`ep`): whole experts over ranks, rows travel to them and back.

Lepikhin et al. 2020 (GShard), without its padding: a rank sends exactly the rows that were chosen
for another rank's experts, however uneven that is. Three sets of buffers take turns: while the
experts work on one chunk of rows, the next is on its way to them and the previous on its way back.
An expert's outputs return unsummed, and the row's own rank combines them by ascending expert id,
so neither the order of arrival nor the place of an expert changes a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Arena, Array
from pympa.kernels import Kernels
from pympa.layout import split
from pympa.transport import Transport

_TURNS = 3

Compute = Callable[[Array, NDArray[np.int64]], None]
"""Replaces rows `[rows, d_model]`, sorted by local expert, by the experts' outputs.

Its second argument is the number of rows of each local expert, int64 `[local experts]`.
"""


class Routes(NamedTuple):
    """Where rows go.

    experts: int32 `[rows, top_k]`, ascending, -1 where dropped. weights: float32, the same shape.
    """

    experts: Array
    weights: Array

    def rows(self, here: slice) -> Routes:
        """Return the routes of some rows."""
        return Routes(self.experts[here], self.weights[here])


class _Chunk(NamedTuple):
    """Some rows of this rank on their way, and others' rows that came here.

    home: this rank's rows by expert, going out and coming back. away: rows for this rank's
    experts, by expert and then by the rank that they came from.
    """

    here: slice
    sources: Array
    places: Array
    home: list[Array]
    away: list[list[Array]]
    home_rows: Array
    away_rows: Array
    group_rows: NDArray[np.int64]


def run_experts(
    kernels: Kernels,
    transport: Transport,
    arena: Arena,
    x: Array,
    routes: Routes,
    *,
    experts: int,
    chunks: int,
    compute: Compute,
    base: Array | None,
    out: Array,
) -> NDArray[np.int64]:
    """Set out = base + weighted sum of the outputs of each row's experts. Collective.

    Args:
        kernels: the rank's kernels.
        transport: the ranks that share the experts; contiguous ones each, in order.
        arena: memory for rows on their way.
        x: `[rows, d_model]`.
        routes: which rows go where.
        experts: of the layer.
        chunks: parts that the rows travel in, the same number on all ranks.
        compute: runs this rank's experts.
        base: `[rows, d_model]` or None.
        out: `[rows, d_model]`.

    Returns:
        Rows that this rank sent to each expert, int64 `[experts]`.
    """
    top_k = routes.experts.shape[1]
    sources = arena.empty((len(x) * top_k,), np.int32)
    places = arena.empty((len(x), top_k), np.int32)
    parts = [slice(*bounds) for bounds in split(len(x), chunks)]
    sent = np.zeros((chunks, experts), np.int64)
    for number, here in enumerate(parts):
        slots = sources[here.start * top_k : here.stop * top_k]
        sent[number] = kernels.sort_rows(routes.experts[here], experts, slots, places[here])
    shares = split(experts, transport.size)
    owners = [rank for rank, (first, last) in enumerate(shares) for _ in range(first, last)]
    arriving = np.stack(
        transport.exchange_counts([np.ascontiguousarray(sent[:, a:b]) for a, b in shares]), axis=-1
    )  # [chunks, local experts, ranks]
    turns = min(_TURNS, chunks)
    homes = _buffers(transport, turns, int(sent.sum(1).max()), x)
    alone = transport.size == 1
    aways = homes if alone else _buffers(transport, turns, int(arriving.sum((1, 2)).max()), x)

    def chunk(number: int) -> _Chunk:
        here, turn = parts[number], number % turns
        home = homes[turn][: sent[number].sum()]
        away = aways[turn][: arriving[number].sum()]
        by_rank = iter(_cut(away, arriving[number].ravel()))
        return _Chunk(
            here,
            sources[here.start * top_k : here.start * top_k + len(home)],
            places[here],
            _cut(home, sent[number]),
            [[next(by_rank) for _ in shares] for _ in arriving[number]],
            home,
            away,
            arriving[number].sum(1),
        )

    def exchange(part: _Chunk, *, outward: bool) -> Any:
        mine = list(zip(part.home, owners, strict=True))
        others = [(rows, rank) for of_expert in part.away for rank, rows in enumerate(of_expert)]
        if alone:
            return None
        return transport.start(mine, others) if outward else transport.start(others, mine)

    def dispatch(number: int) -> tuple[_Chunk, Any]:
        part = chunk(number)
        kernels.gather_rows(x[part.here], part.sources, part.home_rows)
        return part, exchange(part, outward=True)

    def combine(part: _Chunk, returning: Any) -> None:
        if returning is not None:
            transport.wait(returning)
        own_base = None if base is None else base[part.here]
        weights = routes.weights[part.here]
        kernels.combine_rows(part.home_rows, part.places, weights, own_base, out[part.here])

    dispatched = dispatch(0)
    returning: list[tuple[_Chunk, Any]] = []
    for number in range(chunks):
        part, pending = dispatched
        if number + 1 < chunks:
            dispatched = dispatch(number + 1)
        if pending is not None:
            transport.wait(pending)
        compute(part.away_rows, part.group_rows)
        returning.append((part, exchange(part, outward=False)))
        if number > 0:
            combine(*returning.pop(0))
    combine(*returning.pop())
    rows: NDArray[np.int64] = sent.sum(0)
    return rows


def _buffers(transport: Transport, count: int, rows: int, like: Array) -> list[Array]:
    return [transport.empty((rows, like.shape[1]), like.dtype) for _ in range(count)]


def _cut(rows: Array, counts: Sequence[int] | NDArray[np.int64]) -> list[Array]:
    """Return consecutive parts of so many rows each."""
    ends = np.cumsum(counts)
    return [rows[end - count : end] for end, count in zip(ends, counts, strict=True)]
