"""Grid attention (`dim`): slices of each head over ranks, the second level of an m x n grid.

Softmax needs the sum over slices of q_j·k_j, so slices cannot attend alone and stay exact. They
meet in one of three ways. `exchange`: queries are exchanged for whole heads of a part of the rows,
keys and values are gathered, outputs go back; no flop is done twice. `gather`: q and k are gathered
and v stays sliced, so every rank makes all scores. `reduce`: partial scores are summed tile by
tile, which is the literal reading and sends O(rows²). `independent` slices attend alone, which
is another model: it prices what such a figure in a paper would mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Arena, Array
from pympa.kernels import AttentionSpec, Kernels, KvBlock, State
from pympa.layout import Layout, Span, score_tiles
from pympa.parallel.shares import width
from pympa.parallel.tensor import reduce_partials
from pympa.transport import Transport


def gather_heads(
    kernels: Kernels,
    transport: Transport,
    part: Array,
    slices: Sequence[list[Span]],
    out: Array,
) -> None:
    """Fill whole heads from the slices of all ranks. Collective.

    Args:
        kernels: the rank's kernels.
        transport: the slices.
        part: this rank's `[rows, heads, slice]`.
        slices: spans of each rank's slice.
        out: `[rows, heads, dim]`.
    """
    parts = [_empty_slice(transport, len(part), part, spans) for spans in slices]
    parts[transport.index] = part
    transport.all_gather(parts)
    for other, spans in zip(parts, slices, strict=True):
        _place(kernels, other, spans, out)


def exchange_queries(
    kernels: Kernels,
    transport: Transport,
    q: Array,
    order: NDArray[np.int32],
    rows: Sequence[int],
    slices: Sequence[list[Span]],
    out: Array,
) -> None:
    """Give away slices of rows for whole heads of this rank's part of them. Collective.

    Args:
        kernels: the rank's kernels.
        transport: the slices.
        q: `[all rows, heads, slice]`.
        order: the rows, those of the first rank's part first.
        rows: of each rank's part.
        slices: spans of each rank's slice.
        out: whole heads of this rank's part `[rows, heads, dim]`, in the order of `order`.
    """
    ordered = transport.empty(q.shape, q.dtype)
    kernels.gather_rows(_flat(q), order, _flat(ordered))
    parts = [_empty_slice(transport, len(out), q, spans) for spans in slices]
    transport.all_to_all(_segments(ordered, rows), parts)
    for part, spans in zip(parts, slices, strict=True):
        _place(kernels, part, spans, out)


def return_outputs(
    kernels: Kernels,
    transport: Transport,
    o: Array,
    places: NDArray[np.int32],
    rows: Sequence[int],
    slices: Sequence[list[Span]],
    out: Array,
) -> None:
    """Give whole heads of this rank's part of the rows back for slices of all. Collective.

    Args:
        kernels: the rank's kernels.
        transport: the slices.
        o: `[rows, heads, dim]`.
        places: where each row is in the order of `exchange_queries`.
        rows: of each rank's part.
        slices: spans of each rank's slice.
        out: `[all rows, heads, slice]`.
    """
    parts = [_empty_slice(transport, len(o), o, spans) for spans in slices]
    for part, spans in zip(parts, slices, strict=True):
        at = 0
        for first, last in spans:
            kernels.copy(o[..., first:last], part[..., at : at + last - first])
            at += last - first
    ordered = transport.empty(out.shape, out.dtype)
    transport.all_to_all(parts, _segments(ordered, rows))
    kernels.gather_rows(_flat(ordered), places, _flat(out))


def attend_by_scores(
    kernels: Kernels,
    transport: Transport,
    arena: Arena,
    q: Array,
    q_layout: Layout,
    kv: KvBlock,
    spec: AttentionSpec,
    state: State,
) -> None:
    """Fold one block of keys into the state, summing scores over the slices. Collective.

    A tile of scores `[rows, heads, keys]` exists at a time, so memory stays O(rows).

    Args:
        kernels: the rank's kernels.
        transport: the slices.
        arena: memory for a tile.
        q: slices of queries `[rows, heads, slice]`.
        q_layout: of the queries.
        kv: slices of keys and values.
        spec: masks, scale and head map.
        state: of `q`, with values' slices.
    """
    heads = q.shape[1]
    for tile in score_tiles(q_layout, kv.layout, heads, spec.causal, spec.window):
        rows, keys = slice(*tile.rows), slice(*tile.keys)
        shape = tile.rows[1] - tile.rows[0], heads, tile.keys[1] - tile.keys[0]
        with arena.scope():
            partial = transport.empty(shape, np.float32)
            scores = transport.empty(shape, np.float32)
            kernels.score_tile(q[rows], kv.k[keys], spec.kv_head_of_q, partial)
            reduce_partials(kernels, transport, _flat(partial), None, _flat(scores))
            kernels.fold_tile(
                scores, tile.q_start, tile.k_start, kv.v[keys], state.rows(*tile.rows), spec
            )


def _place(kernels: Kernels, part: Array, spans: list[Span], out: Array) -> None:
    at = 0
    for first, last in spans:
        kernels.copy(part[..., at : at + last - first], out[..., first:last])
        at += last - first


def _empty_slice(transport: Transport, rows: int, like: Array, spans: list[Span]) -> Array:
    return transport.empty((rows, like.shape[1], width(spans)), like.dtype)


def _segments(array: Array, rows: Sequence[int]) -> list[Array]:
    ends = np.cumsum(rows)
    return [array[end - count : end] for end, count in zip(ends, rows, strict=True)]


def _flat(array: Array) -> Array:
    return array.reshape(len(array), array.shape[1] * array.shape[2])
