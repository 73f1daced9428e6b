"""Expert parallelism (`ep`): whole experts on each rank; rows are sent to them and back.

Lepikhin et al. 2020 (GShard), without its padding: a rank sends exactly the rows that chose another
rank's experts, however uneven that is. Rows are sent in chunks, and three sets of buffers are used
in rotation: while the experts compute one chunk, the next one is being sent to them and the
previous one back. An expert's outputs are returned unsummed, and the row's own rank combines them
by ascending expert id, so neither the order of arrival nor the rank of an expert changes a bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pympa.kernels import Kernels
from pympa.parallel.rows import cut_rows
from pympa.plan.layout import split
from pympa.plan.mesh import Plan
from pympa.runtime.arena import Arena, Array
from pympa.transport import Transport

_BUFFER_SETS = 3

Compute = Callable[[Array, NDArray[np.int64]], None]
"""A function that replaces rows `[rows, d_model]`, sorted by local expert, by expert outputs.

Its second argument is the number of rows of each local expert, int64 `[local experts]`.
"""


class Routes(NamedTuple):
    """The experts of rows.

    Attributes:
        experts: the expert ids, int32 `[rows, top_k]`, ascending, -1 where dropped.
        weights: the weights of the experts, float32, of the same shape.
    """

    experts: Array
    weights: Array

    def rows(self, here: slice) -> Routes:
        """Return the routes of some rows."""
        return Routes(self.experts[here], self.weights[here])


class Base(NamedTuple):
    """The rows that are added to experts' outputs, such as those of shared experts.

    Attributes:
        rows: the rows `[rows, d_model]`.
        gate: the logits whose sigmoids multiply them, float32 `[rows, 1]`; None means by 1.
    """

    rows: Array
    gate: Array | None


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks that share the experts of a layer, and this rank's resources to reach them.

    Attributes:
        kernels: the rank's kernels.
        transport: the transport of these ranks; each has contiguous experts, in order.
        arena: the memory for rows that are sent.
        experts: the number of experts of the layer.
    """

    kernels: Kernels
    transport: Transport
    arena: Arena
    experts: int

    def buffers(self, count: int, rows: int, like: Array) -> list[Array]:
        """Return `count` arrays `[rows, d_model]` that can be sent."""
        return [self.transport.empty((rows, like.shape[1]), like.dtype) for _ in range(count)]


class _Chunk(NamedTuple):
    """Rows of this rank that are sent to experts together, and rows received from other ranks.

    Attributes:
        here: the rows of this rank.
        sources: the row of each pair (row, choice), by expert.
        inverse: the index of each pair in that order, `[rows, top_k]`.
        sent: the pairs' rows by expert, before and after the experts compute.
        received: the rows for this rank's experts, by expert and then by rank.
        sends: the parts of `sent` with their ranks.
        receives: the parts of `received` with their ranks.
        group_rows: the number of rows of each local expert, int64 `[local experts]`.
    """

    here: slice
    sources: Array
    inverse: Array
    sent: Array
    received: Array
    sends: list[tuple[Array, int]]
    receives: list[tuple[Array, int]]
    group_rows: NDArray[np.int64]


class Dispatch:
    """The rows of one call, sent to experts and back in chunks. Collective to make.

    Args:
        group: the ranks that share the experts.
        x: the rows `[rows, d_model]`.
        routes: the experts of each row.
        chunks: the number of chunks, the same on all ranks.

    Attributes:
        chunks: the number of chunks.
        rows: the number of rows that this rank sends to each expert, int64 `[experts]`.
    """

    def __init__(self, group: ExpertGroup, x: Array, routes: Routes, chunks: int) -> None:
        self._group, self._x, self._routes, self.chunks = group, x, routes, chunks
        top_k = routes.experts.shape[1]
        self._sources = group.arena.empty((len(x) * top_k,), np.int32)
        self._inverse = group.arena.empty((len(x), top_k), np.int32)
        self._parts = [slice(*bounds) for bounds in split(len(x), chunks)]
        self._sent = np.zeros((chunks, group.experts), np.int64)
        for number, here in enumerate(self._parts):
            self._sent[number] = group.kernels.sort_rows(
                routes.experts[here],
                group.experts,
                self._sources[here.start * top_k : here.stop * top_k],
                self._inverse[here],
            )
        self._shares = split(group.experts, group.transport.size)
        counts = [np.ascontiguousarray(self._sent[:, a:b]) for a, b in self._shares]
        # [chunks, local experts, ranks]
        self._received = np.stack(group.transport.exchange_counts(counts), axis=-1)
        sets = min(_BUFFER_SETS, chunks)
        self._alone = group.transport.size == 1
        self._send_buffers = group.buffers(sets, int(self._sent.sum(1).max()), x)
        self._receive_buffers = self._send_buffers
        if not self._alone:
            most = int(self._received.sum((1, 2)).max())
            self._receive_buffers = group.buffers(sets, most, x)
        self.rows: NDArray[np.int64] = self._sent.sum(0)

    def send(self, number: int) -> tuple[_Chunk, Any]:
        """Gather a chunk's rows by expert and start to send them; return the chunk for `wait`."""
        chunk = self._chunk(number)
        self._group.kernels.gather_rows(self._x[chunk.here], chunk.sources, chunk.sent)
        return chunk, self._start(chunk.sends, chunk.receives)

    def send_back(self, chunk: _Chunk) -> tuple[_Chunk, Any]:
        """Start to send the outputs of a chunk back to the ranks of its rows."""
        return chunk, self._start(chunk.receives, chunk.sends)

    def wait(self, pending: Any) -> None:
        """Wait until the messages of a `send` or `send_back` are done."""
        if pending is not None:
            self._group.transport.wait(pending)

    def combine(self, chunk: _Chunk, base: Base | None, out: Array) -> None:
        """Set out = base + weighted sum of the outputs, in the rows of a chunk."""
        here = chunk.here
        gate = None if base is None or base.gate is None else base.gate[here]
        self._group.kernels.combine_rows(
            chunk.sent,
            chunk.inverse,
            self._routes.weights[here],
            None if base is None else base.rows[here],
            out[here],
            base_gate=gate,
        )

    def _start(self, sends: list[tuple[Array, int]], receives: list[tuple[Array, int]]) -> Any:
        return None if self._alone else self._group.transport.start(sends, receives)

    def _chunk(self, number: int) -> _Chunk:
        sent_rows, received_rows = self._sent[number], self._received[number]
        buffer, here = number % len(self._send_buffers), self._parts[number]
        sent = self._send_buffers[buffer][: sent_rows.sum()]
        received = self._receive_buffers[buffer][: received_rows.sum()]
        owners = [
            rank for rank, (first, last) in enumerate(self._shares) for _ in range(first, last)
        ]
        ranks = itertools.cycle(range(len(self._shares)))
        start = here.start * self._routes.experts.shape[1]
        return _Chunk(
            here,
            self._sources[start : start + len(sent)],
            self._inverse[here],
            sent,
            received,
            list(zip(cut_rows(sent, sent_rows), owners, strict=True)),
            list(zip(cut_rows(received, received_rows.ravel()), ranks, strict=False)),
            received_rows.sum(1),
        )


def dispatch_chunks(plan: Plan, most_rows: int, dispatch_rows: int) -> int:
    """Return the number of chunks in which rows are sent to experts, the same on all ranks.

    Args:
        plan: the plan.
        most_rows: the largest number of rows of any rank.
        dispatch_rows: the number of rows that should be sent together.
    """
    routed = most_rows * plan.expert_columns // plan.degree("columns")
    return max(1, -(-routed // dispatch_rows))


def run_experts(dispatch: Dispatch, compute: Compute, base: Base | None, out: Array) -> None:
    """Set out = base + weighted sum of the outputs of each row's experts. Collective.

    Args:
        dispatch: the rows with their experts.
        compute: a function that runs this rank's experts.
        base: the rows to add, or None.
        out: an output `[rows, d_model]`.
    """
    arriving = dispatch.send(0)
    returning: tuple[_Chunk, Any] | None = None
    for number in range(dispatch.chunks):
        chunk, pending = arriving
        if number + 1 < dispatch.chunks:
            arriving = dispatch.send(number + 1)
        dispatch.wait(pending)
        compute(chunk.received, chunk.group_rows)
        previous, returning = returning, dispatch.send_back(chunk)
        if previous is not None:
            _finish(dispatch, *previous, base, out)
    if returning is not None:
        _finish(dispatch, *returning, base, out)


def _finish(dispatch: Dispatch, chunk: _Chunk, pending: Any, base: Base | None, out: Array) -> None:
    dispatch.wait(pending)
    dispatch.combine(chunk, base, out)
