"""Grid attention: the dimension of each head is split over ranks (plan axis `dim`).

In an m x n grid of ranks, m groups split the heads (`tp`), and the n ranks of a group split the
dimension of each head. A score is the sum over the slices j of q_j·k_j, where q_j and k_j are on
rank j; softmax needs the whole sum. There are three exact ways. `exchange`: queries are exchanged
for whole heads of a part of the rows, keys and values are gathered, outputs are sent back; no flop
is done twice. `gather`: q and k are gathered and v stays sliced, so every rank computes all scores.
`reduce`: partial scores are summed over the ranks, tile by tile, as the formula says; this sends
O(rows²) bytes. With `independent` each slice has a softmax of its own. That is another model, not
an exact one: it only measures the time of papers that split heads so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pympa.kernels import AttentionSpec, Kernels, KvBlock, State
from pympa.parallel.rows import cut_rows
from pympa.parallel.tensor import reduce_partials
from pympa.plan.layout import Bounds, Layout, Range
from pympa.plan.shares import width
from pympa.runtime.arena import Arena, Array
from pympa.transport import Transport

KEY_TILE = 512  # keys that kernels fold together, at multiples of it; part of the contract on bits
_TILE_SCORES = 1 << 20  # the most scores of one tile: 4 MB of float32


def gather_heads(
    kernels: Kernels,
    transport: Transport,
    part: Array,
    slices: Sequence[list[Bounds]],
    out: Array,
) -> None:
    """Fill whole heads from the slices of all ranks. Collective.

    Args:
        kernels: the rank's kernels.
        transport: the transport to the ranks that share the heads, one slice each.
        part: the slice of this rank `[rows, heads, slice]`.
        slices: the (start, stop) intervals of the head dimension that each rank has.
        out: an output `[rows, heads, dim]`.
    """
    parts = [_empty_slice(transport, len(part), part, spans) for spans in slices]
    parts[transport.index] = part
    transport.all_gather(parts)
    for other, spans in zip(parts, slices, strict=True):
        _copy_slice(kernels, other, spans, out)


def exchange_queries(
    kernels: Kernels,
    transport: Transport,
    q: Array,
    order: NDArray[np.int32],
    rows: Sequence[int],
    slices: Sequence[list[Bounds]],
    out: Array,
) -> None:
    """Exchange slices of all rows for whole heads of this rank's part of the rows. Collective.

    Args:
        kernels: the rank's kernels.
        transport: the transport to the ranks that share the heads, one slice each.
        q: the slices of all rows `[all rows, heads, slice]`.
        order: the row indices: those of the first rank's part, then of the second's, and so on.
        rows: the number of rows of each rank's part.
        slices: the (start, stop) intervals of the head dimension that each rank has.
        out: an output for whole heads of this rank's part `[rows, heads, dim]`, in that order.
    """
    ordered = transport.empty(q.shape, q.dtype)
    kernels.gather_rows(_flat(q), order, _flat(ordered))
    parts = [_empty_slice(transport, len(out), q, spans) for spans in slices]
    transport.all_to_all(cut_rows(ordered, rows), parts)
    for part, spans in zip(parts, slices, strict=True):
        _copy_slice(kernels, part, spans, out)


def return_outputs(
    kernels: Kernels,
    transport: Transport,
    o: Array,
    inverse: NDArray[np.int32],
    rows: Sequence[int],
    slices: Sequence[list[Bounds]],
    out: Array,
) -> None:
    """Exchange whole heads of this rank's part of the rows for slices of all rows. Collective.

    Args:
        kernels: the rank's kernels.
        transport: the transport to the ranks that share the heads, one slice each.
        o: the whole heads `[rows, heads, dim]`.
        inverse: the inverse permutation of the `order` of `exchange_queries`.
        rows: the number of rows of each rank's part.
        slices: the (start, stop) intervals of the head dimension that each rank has.
        out: an output for the slices `[all rows, heads, slice]`.
    """
    parts = [_empty_slice(transport, len(o), o, spans) for spans in slices]
    for part, spans in zip(parts, slices, strict=True):
        at = 0
        for first, last in spans:
            kernels.copy(o[..., first:last], part[..., at : at + last - first])
            at += last - first
    ordered = transport.empty(out.shape, out.dtype)
    transport.all_to_all(parts, cut_rows(ordered, rows))
    kernels.gather_rows(_flat(ordered), inverse, _flat(out))


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
    """Fold one block of keys into the state, with scores summed over the slices. Collective.

    Works on one tile of scores `[tile rows, heads, tile keys]` at a time, in two float32 arrays of
    at most 4 MB each, so memory does not grow with the number of rows or keys.

    Args:
        kernels: the rank's kernels.
        transport: the transport to the ranks that share the heads, one slice each.
        arena: the memory for the tiles.
        q: the slices of queries `[rows, heads, slice]`.
        q_layout: the layout of the queries.
        kv: the slices of keys and values.
        spec: the masks, scale and head map.
        state: the softmax state of the rows of `q`; its output has only this rank's slice of v.
    """
    heads = q.shape[1]
    for tile in score_tiles(q_layout, kv.ranges, heads, spec.causal, spec.window):
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


def _copy_slice(kernels: Kernels, part: Array, spans: list[Bounds], out: Array) -> None:
    at = 0
    for first, last in spans:
        kernels.copy(part[..., at : at + last - first], out[..., first:last])
        at += last - first


def _empty_slice(transport: Transport, rows: int, like: Array, spans: list[Bounds]) -> Array:
    return transport.empty((rows, like.shape[1], width(spans)), like.dtype)


def _flat(array: Array) -> Array:
    return array.reshape(len(array), array.shape[1] * array.shape[2])


class ScoreTile(NamedTuple):
    """Rows of queries and of keys, (start, stop) each, with at least one visible pair.

    The queries are consecutive tokens from position `q_start` on, the keys from `k_start` on.
    """

    rows: Bounds
    keys: Bounds
    q_start: int
    k_start: int


def score_tiles(
    q: Layout, k_ranges: NDArray[np.int64], heads: int, causal: bool, window: int | None
) -> Iterator[ScoreTile]:
    """Yield the tiles of the scores that have a visible pair of a query and a key.

    Each query row meets its keys in the order of `k_ranges`, see `KvBlock.ranges`.
    """
    step = max(1, _TILE_SCORES // (KEY_TILE * heads))
    q_row, keys_of = 0, k_ranges.tolist()
    for a in q.ranges:
        for sequence, k_first, k_length, k_row in keys_of:
            if a.sequence == sequence:
                cuts = Layout((Range(sequence, k_first, k_length),)).cut(KEY_TILE)
                for first, (_, k_start, length) in itertools.product(
                    range(0, a.length, step), cuts
                ):
                    last = min(first + step, a.length)
                    # Distances from the last query to the first key, and from first to last.
                    near = a.start + last - 1 - k_start
                    far = a.start + first - (k_start + length - 1)
                    hidden = causal and near < 0
                    if window is not None:
                        hidden |= far >= window or (not causal and near <= -window)
                    if not hidden:
                        keys = k_row + k_start - k_first
                        yield ScoreTile(
                            (q_row + first, q_row + last),
                            (keys, keys + length),
                            a.start + first,
                            k_start,
                        )
        q_row += a.length
