"""Bytes that move between ranks in a step, by axis, in closed form, as transports must count them.

A sum is a reduce-scatter and an all-gather, 2(p-1) times the size of the array. This module checks
the strategies, so it has its own count of tiles, chunks and groups.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pympa.plan.layout import (
    Layout,
    sequence_starts,
    split,
    split_tokens,
)
from pympa.plan.mesh import Plan
from pympa.plan.rings import (
    Ring,
    moved_keys,
    needed_keys,
    query_parts,
    ring_queries,
    steps_in_time,
)
from pympa.spec import LayerSpec, ModelSpec

_COUNT_BYTES = 8  # of one number of rows in a message
_SCORE_BYTES = 4
_SQUARE_BYTES = 4  # of the sum of squares of a row
_KEY_TILE = 512  # keys whose scores are summed together, at multiples of 512
_TILE_SCORES = 1 << 20  # the most scores of a tile, over all heads

Routing = Mapping[int, NDArray[np.int32]]
"""The experts of each token by layer, int32 `[tokens, top_k]`, -1 where dropped."""


class Volume(NamedTuple):
    """The bytes of all ranks together in a step, by axis.

    Attributes:
        sent: the bytes in messages.
        read: the bytes of keys and values that ranks read in other ranks' memory.
    """

    sent: dict[str, int]
    read: dict[str, int]


def comm_volume(
    spec: ModelSpec,
    plan: Plan,
    lengths: Sequence[int],
    itemsize: int,
    routing: Routing | None = None,
    *,
    shares_memory: bool = False,
    dispatch_rows: int = 512,
) -> Volume:
    """Return the bytes that move between ranks in a step.

    tp: each of the 2·layers branches and the embedding is summed over tp·dim; an expert branch is
    reduce-scattered over etp and all-gathered over tp·dim. With a norm of q and k over all heads,
    each rank sends two sums of squares of each row to all others.
    pp: each boundary passes the residual stream once on every rank of tp·dim.
    cp: each K/V block is sent to the other p-1 ranks, or is read by them; kept K/V are sent again
    with every token chunk of their sequence. In a layer with a window each K/V row is moved only to
    the ranks with a query that sees it.
    ulysses: each rank sends the heads that it does not attend with, and receives them back.
    dim: see `Plan.dim_algo`.
    ep: each row that chose an expert of another rank is sent there and back, after the counts.

    Args:
        spec: the model.
        plan: the plan.
        lengths: the number of tokens of each sequence.
        itemsize: the bytes of one element.
        routing: the experts of each token; required if ep > 1.
        shares_memory: whether the ranks of a ring read each other's keys and values in place.
        dispatch_rows: the number of rows of a rank that are sent to experts together.

    Raises:
        ValueError: ep > 1 and no routing is given.
    """
    stream = sum(lengths) * spec.d_model * itemsize
    columns, etp = plan.degree("columns"), plan.expert_columns
    sparse = sum(layer.experts > 0 for layer in spec.blocks)
    sent: Counter[str] = Counter()
    read: Counter[str] = Counter()
    sent["pp"] = (plan.pp - 1) * columns * stream
    sent["tp"] = (columns - 1) * stream * (2 * (2 * len(spec.blocks) + 1) - sparse)
    normed = sum(layer.qk_norm == "all" for layer in spec.blocks)
    sent["tp"] += columns * (columns - 1) * normed * 2 * sum(lengths) * _SQUARE_BYTES
    sent["etp"] = (etp - 1) * stream * sparse
    blocks = read if shares_memory and plan.cp_scheme != "allgather" else sent
    steps = list(steps_in_time(plan, lengths))
    moved_rows = lru_cache(maxsize=None)(partial(moved_keys, spec, plan, steps))
    for index, layer in enumerate(spec.blocks):
        for heads in _heads_of_ranks(plan, layer):
            blocks["cp"] += itemsize * _kv_elements(plan, layer, heads, moved_rows(layer.window))
            for groups in steps:
                elements = _exchanged_elements(plan, layer, heads, groups)
                sent += Counter({axis: count * itemsize for axis, count in elements.items()})
                if plan.dim > 1 and plan.dim_algo == "reduce":
                    sent["dim"] += _score_bytes(spec, plan, layer, heads, groups)
        if layer.capacity_group is not None:
            sent["cp"] += columns * _capacity_bytes(layer, layer.capacity_group, steps)
        if layer.experts and plan.ep > 1:
            if routing is None:
                raise ValueError(
                    "comm_volume: routing: expected the experts of each token for ep > 1"
                )
            sent["ep"] += _count_bytes(plan, layer, steps, dispatch_rows)
            moved = _moved_rows(plan, lengths, layer, routing[index], steps)
            sent["ep"] += 2 * etp * moved * spec.d_model * itemsize
    return Volume(*({axis: n for axis, n in counts.items() if n} for counts in (sent, read)))


class HeadsOfRank(NamedTuple):
    """The query and kv heads of a tp rank, and those of each part that `ulysses` makes."""

    heads: int
    kv_heads: int
    q_parts: list[int]
    kv_parts: list[int]


def _heads_of_ranks(plan: Plan, layer: LayerSpec) -> Iterator[HeadsOfRank]:
    """Yield the heads of each tp rank."""

    def kv(first: int, last: int) -> int:
        return layer.kv_head_of(last - 1) + 1 - layer.kv_head_of(first)

    for first, last in split(layer.heads, plan.tp):
        parts = [(first + a, first + b) for a, b in split(last - first, plan.head_exchange)]
        yield HeadsOfRank(
            last - first, kv(first, last), [b - a for a, b in parts], [kv(*part) for part in parts]
        )


def _copies(plan: Plan) -> tuple[int, int]:
    """Return the number of copies of q and k, and of v, on the `dim` ranks together."""
    gathers = plan.dim_algo in ("exchange", "gather") and plan.dim > 1
    return plan.dim if gathers else 1, plan.dim if plan.dim_algo == "exchange" else 1


def _kv_elements(plan: Plan, layer: LayerSpec, heads: HeadsOfRank, rows: Sequence[int]) -> int:
    """Return the elements of K/V that rings move in one layer, for one tp rank's heads.

    Args:
        plan: the plan.
        layer: the layer.
        heads: the heads.
        rows: the rows that rings move in each micro-batch.
    """
    qk_copies, v_copies = _copies(plan)
    row = qk_copies * layer.head_dim + v_copies * layer.value_dim
    parts = query_parts(plan)
    return sum(moved * sum(heads.kv_parts) * row // parts for moved in rows)


def _exchanged_elements(
    plan: Plan, layer: LayerSpec, share: HeadsOfRank, groups: Sequence[Ring]
) -> Counter[str]:
    """Return the elements that `dim` and `ulysses` move in one layer, for one tp rank's heads."""
    sent: Counter[str] = Counter()
    others, slices = plan.dim - 1, plan.dim
    gathers = plan.dim_algo in ("exchange", "gather") and plan.dim > 1
    whole_v = plan.dim_algo == "exchange"
    qk_copies, v_copies = _copies(plan)
    kv_row = qk_copies * layer.head_dim + v_copies * layer.value_dim
    for ring in groups:
        rows = [layout.rows for layout in ring.new]
        queries = [
            [part.rows for part in split_tokens(layout, slices, plan.balance)]
            if plan.splits_queries
            else [layout.rows]
            for layout in ring.new
        ]
        if gathers:
            sent["dim"] += others * sum(rows) * share.kv_heads * layer.head_dim
            if whole_v:
                sent["dim"] += others * sum(rows) * share.kv_heads * layer.value_dim
                # A row's q is sent to the one rank that attends with it, and its o is sent back.
                sent["dim"] += _given_away(queries, share.heads, layer)
            else:
                sent["dim"] += others * sum(rows) * share.heads * layer.head_dim
        for first in range(0, plan.cp, plan.head_exchange):
            members = range(first, first + plan.head_exchange)
            for member, own in zip(members, range(plan.head_exchange), strict=True):
                kv = sum(share.kv_parts) - share.kv_parts[own]
                sent["ulysses"] += rows[member] * kv * kv_row
                for number in range(len(queries[member])):
                    copies_q = 1 if plan.splits_queries else qk_copies
                    copies_o = 1 if plan.splits_queries else v_copies
                    row = copies_q * layer.head_dim + copies_o * layer.value_dim
                    heads = share.heads - share.q_parts[own]
                    sent["ulysses"] += queries[member][number] * heads * row
    return sent


def _given_away(queries: Sequence[Sequence[int]], heads: int, layer: LayerSpec) -> int:
    """Return the elements of q and o that `exchange` moves: all but each rank's own slice."""
    parts = len(queries[0])
    qk = _slice_widths(layer, parts)
    v = [last - first for first, last in split(layer.value_dim, parts)]
    moved = 0
    for rows in queries:
        for part, (q_own, v_own) in zip(rows, zip(qk, v, strict=True), strict=True):
            moved += part * heads * (layer.head_dim - q_own + layer.value_dim - v_own)
    return moved


def _slice_widths(layer: LayerSpec, parts: int) -> list[int]:
    rotated = layer.rotated_dim
    pairs, others = split(rotated // 2, parts), split(layer.head_dim - rotated, parts)
    return [2 * (b - a) + d - c for (a, b), (c, d) in zip(pairs, others, strict=True)]


def _score_bytes(
    spec: ModelSpec, plan: Plan, layer: LayerSpec, share: HeadsOfRank, groups: Sequence[Ring]
) -> int:
    """Return the bytes of summed scores, for one tp rank's heads.

    Scores are summed in tiles of consecutive queries, and of keys up to a multiple of 512; a tile
    without visible pairs is skipped.
    """
    scores = 0
    for ring in groups:
        queries = ring_queries(plan, ring, 0)
        blocks = [
            (q, k if reader == owner else needed_keys(q, k, spec.causal, layer.window))
            for reader, q in enumerate(queries)
            for owner, k in enumerate(ring.kept)
        ]
        for heads, (q, k) in itertools.product(share.q_parts, blocks):
            tiles = _tiles_seen(q, k, max(1, _TILE_SCORES // (_KEY_TILE * heads)), spec, layer)
            scores += heads * tiles
    return 2 * (plan.dim - 1) * scores * _SCORE_BYTES


def _tiles_seen(q: Layout, k: Layout, step: int, spec: ModelSpec, layer: LayerSpec) -> int:
    """Return the number of pairs of query and key in all tiles with a visible pair."""
    found = 0
    for a, b in itertools.product(q.ranges, k.ranges):
        if a.sequence != b.sequence:
            continue
        q_edges = np.unique([*range(a.start, a.start + a.length, step), a.start + a.length])
        inner = np.arange(b.start // _KEY_TILE + 1, -(-(b.start + b.length) // _KEY_TILE))
        k_edges = np.array([b.start, *(inner * _KEY_TILE), b.start + b.length])
        q_first, q_last = q_edges[:-1, None], q_edges[1:, None] - 1
        k_first, k_last = k_edges[None, :-1], k_edges[None, 1:] - 1
        seen = q_last >= k_first if spec.causal else np.ones((len(q_first), k_first.size), bool)
        if layer.window is not None:
            seen = seen & (q_first - k_last < layer.window)
            if not spec.causal:
                seen = seen & (k_first - q_last < layer.window)
        found += int(np.outer(np.diff(q_edges), np.diff(k_edges))[seen].sum())
    return found


def _capacity_bytes(layer: LayerSpec, group: int, steps: Sequence[Sequence[Ring]]) -> int:
    """Return the bytes of the messages that carry the counts of capacity groups in a ring.

    A group may have rows on several ranks, in one micro-batch or in several. In each micro-batch
    with rows of such a group, each rank sends its counts of each group to the other ranks.
    """
    sent = 0
    for rings in zip(*steps, strict=True):  # the rings of one group of sequences, by micro-batch
        pieces = [[_groups_of(layout, group) for layout in ring.new] for ring in rings]
        holders: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        for of_ring in pieces:
            for rank, of_rank in enumerate(of_ring):
                for found in of_rank:
                    holders[found].add(rank)
        for of_ring in pieces:
            every = list(itertools.chain(*of_ring))
            if any(len(holders[found]) > 1 for found in every):
                sent += (len(of_ring) - 1) * len(every)
    return sent * layer.experts * _COUNT_BYTES


def _groups_of(layout: Layout, group: int) -> list[tuple[int, int]]:
    """Return (sequence, index) of the groups that overlap each range of a layout."""
    return [
        (r.sequence, number)
        for r in layout.ranges
        for number in range(r.start // group, (r.start + r.length - 1) // group + 1)
    ]


def _count_bytes(
    plan: Plan, layer: LayerSpec, steps: Sequence[Sequence[Ring]], dispatch_rows: int
) -> int:
    """Return the bytes in which the owners of experts receive the counts of rows.

    Ranks with the same rows route a part of them each, in chunks of `dispatch_rows`; all ranks of
    a stage have as many chunks as the rank with the most rows.
    """
    chunks = 0
    for groups in steps:
        most = max(layout.rows for ring in groups for layout in ring.new)
        routed = most * plan.expert_columns // (plan.tp * plan.dim)
        chunks += max(1, math.ceil(routed / dispatch_rows))
    groups_of_experts = plan.stage_ranks // plan.ep
    return groups_of_experts * (plan.ep - 1) * layer.experts * chunks * _COUNT_BYTES


def _moved_rows(
    plan: Plan,
    lengths: Sequence[int],
    layer: LayerSpec,
    experts: NDArray[np.int32],
    steps: Sequence[Sequence[Ring]],
) -> int:
    """Return the number of choices of an expert on another rank."""
    shares = split(layer.experts, plan.ep)
    owner = np.repeat(np.arange(plan.ep), [last - first for first, last in shares])
    slices = plan.degree("columns") // plan.expert_columns
    starts, moved = sequence_starts(lengths), 0
    for groups in steps:
        ranks = (layout.rows_from(starts) for ring in groups for layout in ring.new)
        for number, rows in enumerate(ranks):
            for part, (first, last) in enumerate(split(len(rows), slices)):
                chosen = experts[rows[first:last]]
                chosen = chosen[chosen >= 0]
                moved += int((owner[chosen] != (number * slices + part) % plan.ep).sum())
    return moved
