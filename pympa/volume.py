"""Bytes that a plan sends in a step, by axis, in closed form: what every transport must count.

Sums are a reduce-scatter and an all-gather, 2(p-1) times the size of what is summed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pympa.layout import (
    Layout,
    score_tiles,
    sequence_starts,
    shared_groups,
    split,
    split_batch,
    split_micro_batches,
    split_tokens,
)
from pympa.mesh import Plan
from pympa.spec import LayerSpec, ModelSpec

DISPATCH_ROWS = 512  # of a rank that travel to experts together; more would overlap less
_COUNT_BYTES = 8  # of a number of rows on its way
_SCORE_BYTES = 4

Routing = Mapping[int, NDArray[np.int32]]
"""Experts of each token by layer, int32 `[tokens, top_k]`, -1 where dropped."""


def dispatch_chunks(plan: Plan, most_rows: int, rows: int = DISPATCH_ROWS) -> int:
    """Return the parts that rows travel to experts in, the same number on all ranks of a stage.

    Args:
        plan: the mesh.
        most_rows: rows of the rank that has most of them.
        rows: that should travel together.
    """
    routed = most_rows * plan.expert_columns // plan.degree("columns")
    return max(1, -(-routed // rows))


def bytes_sent(
    spec: ModelSpec,
    plan: Plan,
    lengths: Sequence[int],
    itemsize: int,
    routing: Routing | None = None,
) -> dict[str, int]:
    """Return the bytes that all ranks together send in a step, by axis.

    tp: each of the 2·layers branches and the embedding is summed over tp·dim; an expert branch is
    reduce-scattered over etp and all-gathered over tp·dim.
    pp: each boundary passes the residual stream once in every rank of tp·dim.
    cp: each K/V block visits the other p-1 ranks; kept K/V travel again with every token chunk of
    their sequence.
    Holds without a sliding window, which ends the ring early.
    ulysses: each rank gives away the heads that it does not attend with, and gets them back.
    dim: see `Plan.dim_algo`.
    ep: each row that chose an expert of another rank goes there and back, after the counts.

    Args:
        spec: the model.
        plan: the mesh.
        lengths: tokens of each sequence.
        itemsize: bytes of an element.
        routing: needed where ep > 1.
    """
    stream = sum(lengths) * spec.d_model * itemsize
    columns, etp = plan.degree("columns"), plan.expert_columns
    sparse = sum(layer.experts > 0 for layer in spec.blocks)
    sent: Counter[str] = Counter()
    sent["pp"] = (plan.pp - 1) * columns * stream
    sent["tp"] = (columns - 1) * stream * (2 * (2 * len(spec.blocks) + 1) - sparse)
    sent["etp"] = (etp - 1) * stream * sparse
    turns = list(_turns(plan, lengths))
    for index, layer in enumerate(spec.blocks):
        for head_share in _head_shares(plan, layer):
            for turn in turns:
                elements = _attention_elements(spec, plan, layer, head_share, turn)
                sent += Counter({axis: count * itemsize for axis, count in elements.items()})
                if plan.dim > 1 and plan.dim_algo == "reduce":
                    sent["dim"] += _score_bytes(spec, plan, layer, head_share, turn)
        if layer.capacity_group is not None:
            sent["cp"] += columns * _capacity_bytes(layer, layer.capacity_group, turns)
        if layer.experts and plan.ep > 1:
            if routing is None:
                raise ValueError("bytes_sent: ep > 1 needs the routing")
            sent["ep"] += _count_bytes(plan, layer, turns)
            moved = _moved_rows(plan, lengths, layer, routing[index], turns)
            sent["ep"] += 2 * etp * moved * spec.d_model * itemsize
    return {axis: count for axis, count in sent.items() if count}


class Ring(NamedTuple):
    """The tokens of one micro-batch on the `cp` ranks of one group of sequences.

    new: by rank. kept: by rank of the ring, the new ones and what earlier micro-batches had of
    their sequences.
    """

    new: list[Layout]
    kept: list[Layout]


class HeadsOfRank(NamedTuple):
    """Query and kv heads of a tp rank, and of each part of them that `ulysses` makes."""

    heads: int
    kv_heads: int
    q_parts: list[int]
    kv_parts: list[int]


def _turns(plan: Plan, lengths: Sequence[int]) -> Iterator[list[Ring]]:
    """Yield the rings of each micro-batch."""
    groups = split_batch(lengths, plan.dp)
    parts = [split_micro_batches(group, plan.micro_batches) for group in groups]
    kept = [[Layout(())] * plan.degree("ring") for _ in groups]
    for turn in zip(*parts, strict=True):
        rings = []
        for number, part in enumerate(turn):
            new = split_tokens(part, plan.cp, plan.balance)
            firsts = range(0, plan.cp, plan.head_exchange)
            keys = [Layout(()).then(*new[i : i + plan.head_exchange]) for i in firsts]
            sequences = {r.sequence for r in part.ranges}
            kept[number] = [
                old.since(sequences).then(own) for old, own in zip(kept[number], keys, strict=True)
            ]
            rings.append(Ring(new, kept[number]))
        yield rings


def _head_shares(plan: Plan, layer: LayerSpec) -> Iterator[HeadsOfRank]:
    """Yield the heads of each tp rank."""

    def kv(first: int, last: int) -> int:
        return layer.kv_head_of(last - 1) + 1 - layer.kv_head_of(first)

    for first, last in split(layer.heads, plan.tp):
        parts = [(first + a, first + b) for a, b in split(last - first, plan.head_exchange)]
        yield HeadsOfRank(
            last - first, kv(first, last), [b - a for a, b in parts], [kv(*part) for part in parts]
        )


def _attention_elements(
    spec: ModelSpec, plan: Plan, layer: LayerSpec, share: HeadsOfRank, turn: Sequence[Ring]
) -> Counter[str]:
    """Return the elements that move in one layer's attention, for one tp rank's heads."""
    sent: Counter[str] = Counter()
    others, slices = plan.dim - 1, plan.dim
    gathers = plan.dim_algo in ("exchange", "gather") and plan.dim > 1
    whole_v = plan.dim_algo == "exchange"
    qk_copies = slices if gathers else 1  # whole heads on each dim rank, or a slice on each
    v_copies = slices if whole_v else 1
    kv_row = qk_copies * layer.head_dim + v_copies * layer.value_dim
    rings = plan.degree("ring")
    for ring in turn:
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
                # A row's q goes to the one rank that attends to it, and its o comes back.
                sent["dim"] += _given_away(queries, share.heads, layer)
            else:
                sent["dim"] += others * sum(rows) * share.heads * layer.head_dim
        for part in share.kv_parts:
            kept = sum(layout.rows for layout in ring.kept)
            sent["cp"] += (rings - 1) * kept * part * kv_row
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
    """Return the elements of q and o that `exchange` moves: all but a rank's slice of its part."""
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
    turned, rest = split(rotated // 2, parts), split(layer.head_dim - rotated, parts)
    return [2 * (b - a) + d - c for (a, b), (c, d) in zip(turned, rest, strict=True)]


def _score_bytes(
    spec: ModelSpec, plan: Plan, layer: LayerSpec, share: HeadsOfRank, turn: Sequence[Ring]
) -> int:
    """Return the bytes of summed score tiles, for one tp rank's heads."""
    exchange, scores = plan.head_exchange, 0
    for ring in turn:
        groups = range(0, plan.cp, exchange)
        queries = [Layout(()).then(*ring.new[i : i + exchange]) for i in groups]
        for heads in share.q_parts:
            for q in queries:
                for k in ring.kept:
                    for tile in score_tiles(q, k, heads, spec.causal, layer.window):
                        rows, columns = tile.rows, tile.keys
                        scores += (rows[1] - rows[0]) * (columns[1] - columns[0]) * heads
    return 2 * (plan.dim - 1) * scores * _SCORE_BYTES


def _capacity_bytes(layer: LayerSpec, group: int, turns: Sequence[Sequence[Ring]]) -> int:
    """Return the bytes that tell the ranks of a ring how full shared capacity groups are."""
    cuts = 0
    for rings in zip(*turns, strict=True):  # of one group of sequences, by micro-batch
        shared = shared_groups([ring.new for ring in rings], group)
        for ring in rings:
            parts = [r for layout in ring.new for r in layout.cut(group)]
            if any((r.sequence, r.start // group) in shared for r in parts):
                cuts += (len(ring.new) - 1) * len(parts)
    return cuts * layer.experts * _COUNT_BYTES


def _count_bytes(plan: Plan, layer: LayerSpec, turns: Sequence[Sequence[Ring]]) -> int:
    """Return the bytes that tell the owners of experts how many rows will come."""
    chunks = sum(
        dispatch_chunks(plan, max(layout.rows for ring in turn for layout in ring.new))
        for turn in turns
    )
    groups = plan.stage_ranks // plan.ep
    return groups * (plan.ep - 1) * layer.experts * chunks * _COUNT_BYTES


def _moved_rows(
    plan: Plan,
    lengths: Sequence[int],
    layer: LayerSpec,
    experts: NDArray[np.int32],
    turns: Sequence[Sequence[Ring]],
) -> int:
    """Return how many choices are for an expert on another rank."""
    shares = split(layer.experts, plan.ep)
    owner = np.repeat(np.arange(plan.ep), [last - first for first, last in shares])
    slices = plan.degree("columns") // plan.expert_columns
    starts, moved = sequence_starts(lengths), 0
    for turn in turns:
        ranks = (layout.rows_from(starts) for ring in turn for layout in ring.new)
        for number, rows in enumerate(ranks):
            for part, (first, last) in enumerate(split(len(rows), slices)):
                chosen = experts[rows[first:last]]
                chosen = chosen[chosen >= 0]
                moved += int((owner[chosen] != (number * slices + part) % plan.ep).sum())
    return moved
