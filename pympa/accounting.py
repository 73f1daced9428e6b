"""Counts that follow from shapes alone: parameters, flops, bytes sent, what the roofline allows.

A fused multiply-add is 2 flops. Attention counts the query-key pairs that its masks let through,
S(S+1)/2 for a causal sequence of S tokens, and only linears and attention: norms, RoPE and softmax
are not useful flops.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pympa.layout import (
    Layout,
    groups_span,
    split,
    split_batch,
    split_micro_batches,
    split_tokens,
    streams_tokens,
)
from pympa.mesh import Plan
from pympa.spec import LayerSpec, ModelSpec

DISPATCH_ROWS = 512  # of a rank that travel to experts together; more would overlap less
_COUNT_BYTES = 8  # of a number of rows on its way


def visible_pairs(q: Layout, k: Layout, causal: bool, window: int | None) -> int:
    """Return the number of (query, key) pairs that are not masked."""
    keys = defaultdict(list)
    for r in k.ranges:
        keys[r.sequence].append(r)
    total = 0
    for a in q.ranges:
        for b in keys[a.sequence]:
            shift, size = a.start - b.start, (a.length, b.length)
            if causal:
                total += _pairs_at_least(shift, size, 0)
                total -= _pairs_at_least(shift, size, window) if window else 0
            elif window:
                total += _pairs_at_least(shift, size, 1 - window)
                total -= _pairs_at_least(shift, size, window)
            else:
                total += a.length * b.length
    return total


def _pairs_at_least(shift: int, size: tuple[int, int], distance: int) -> int:
    """Count x < size[0], y < size[1] with shift + x - y >= distance."""
    n, m = size

    def summed(t: int) -> int:  # sum of min(max(u, 0), m) over u <= t
        return t * (t + 1) // 2 if 0 < t <= m else max(t - m, 0) * m + m * (m + 1) // 2 * (t > 0)

    first = shift - distance + 1
    return summed(first + n - 1) - summed(first - 1)


def linear_parameters(spec: ModelSpec, layer: LayerSpec) -> int:
    """Return the elements of a block's weight matrices, those of all experts included."""
    return _parameters(spec, layer, layer.experts)


def active_parameters(spec: ModelSpec, layer: LayerSpec) -> int:
    """Return the elements of a block's weight matrices that one token meets."""
    return _parameters(spec, layer, layer.top_k)


def _parameters(spec: ModelSpec, layer: LayerSpec, experts: int) -> int:
    kv = layer.n_kv_heads * (layer.head_dim + layer.value_dim)
    attention = spec.d_model * (layer.heads * (layer.head_dim + layer.value_dim) + kv)
    mlps = experts + layer.shared_experts if layer.experts else 1
    router = layer.experts * spec.d_model
    return attention + router + mlps * (3 if layer.gated else 2) * spec.d_model * layer.mlp_hidden


def parameters(spec: ModelSpec) -> int:
    """Return the elements of all weight matrices: blocks, embedding and head."""
    tables = (1 if spec.tied_head else 2) * spec.vocabulary * spec.d_model
    return tables + sum(linear_parameters(spec, layer) for layer in spec.blocks)


def step_flops(spec: ModelSpec, lengths: Sequence[int]) -> int:
    """Return the useful flops of one forward pass of a batch, with logits of the last tokens.

    Every token counts `top_k` experts, whether or not a choice is dropped.
    """
    whole = Layout(split_batch(lengths, 1)[0].ranges)
    head = 2 * len(whole.ranges) * spec.vocabulary * spec.d_model
    return head + sum(
        2 * whole.rows * active_parameters(spec, layer)
        + 2
        * visible_pairs(whole, whole, spec.causal, layer.window)
        * layer.heads
        * (layer.head_dim + layer.value_dim)
        for layer in spec.blocks
    )


def roofline_seconds(
    spec: ModelSpec,
    lengths: Sequence[int],
    itemsize: int,
    *,
    flops_per_second: float,
    bytes_per_second: float,
    cores: int,
) -> float:
    """Return the least time a step can take on `cores` cores (Williams et al. 2009).

    All cores compute at their peak, or read the weights once at their bandwidth, whichever takes
    longer.
    """
    compute = step_flops(spec, lengths) / (flops_per_second * cores)
    read = parameters(spec) * itemsize / (bytes_per_second * cores)
    return max(compute, read)


def dispatch_chunks(plan: Plan, most_rows: int) -> int:
    """Return the parts that rows travel to experts in, the same number on all ranks of a stage.

    Args:
        plan: the mesh.
        most_rows: rows of the rank that has most of them.
    """
    routed = most_rows * plan.expert_columns // (plan.tp * plan.dim)
    return max(1, -(-routed // DISPATCH_ROWS))


def bytes_sent(
    spec: ModelSpec,
    plan: Plan,
    lengths: Sequence[int],
    itemsize: int,
    routing: Mapping[int, NDArray[np.int32]] | None = None,
) -> dict[str, int]:
    """Return the bytes that all ranks together send in a step, by axis.

    tp: each of the 2·layers branches and the embedding is summed by reduce-scatter and all-gather,
    2(p-1) times its size; an expert branch by a reduce-scatter over etp and an all-gather over tp.
    pp: each boundary passes the residual stream once in every tp rank.
    cp: each K/V block visits the other p-1 ranks; kept K/V travel again with every token chunk.
    ep: each row that chose an expert of another rank goes there and back, after the counts.
    Holds for the ring without a sliding window.

    Args:
        spec: the model.
        plan: the mesh.
        lengths: tokens of each sequence.
        itemsize: bytes of an element.
        routing: experts of each token by layer, int32 `[tokens, top_k]`, -1 where dropped; needed
            where ep > 1.
    """
    tokens = sum(lengths)
    stream = tokens * spec.d_model * itemsize
    columns, sparse = plan.expert_columns, [layer for layer in spec.blocks if layer.experts]
    sent: Counter[str] = Counter()
    sent["pp"] = (plan.pp - 1) * plan.tp * stream
    sent["tp"] = (plan.tp - 1) * stream * (2 * (2 * len(spec.blocks) + 1) - len(sparse))
    sent["etp"] = (columns - 1) * stream * len(sparse)
    travelling_rows = 0
    for group in split_batch(lengths, plan.dp):
        chunks = split_micro_batches(group, plan.micro_batches)
        kept = 0
        for chunk in chunks:
            kept = kept + chunk.rows if streams_tokens(group, plan.micro_batches) else chunk.rows
            travelling_rows += kept
    turns = list(_micro_batches(plan, lengths))
    for index, layer in enumerate(spec.blocks):
        heads = sum(kv_last - kv_first for kv_first, kv_last in _kv_shares(layer, plan.tp))
        row = heads * (layer.head_dim + layer.value_dim) * itemsize
        sent["cp"] += (plan.cp - 1) * travelling_rows * row
        if layer.capacity_group is not None:
            sent["cp"] += plan.tp * _capacity_bytes(layer, layer.capacity_group, turns)
        if layer.experts and plan.ep > 1:
            if routing is None:
                raise ValueError("bytes_sent: ep > 1 needs the routing")
            count = _count_bytes(plan, layer, turns)
            width = spec.d_model * itemsize
            moved = _moved_rows(plan, lengths, layer, routing[index], turns)
            sent["ep"] += count + 2 * columns * moved * width
    return {axis: count for axis, count in sent.items() if count}


Turn = list[list[Layout]]
"""Layouts of one micro-batch by dp and cp coordinate."""


def _micro_batches(plan: Plan, lengths: Sequence[int]) -> Iterator[Turn]:
    groups = split_batch(lengths, plan.dp)
    parts = [split_micro_batches(group, plan.micro_batches) for group in groups]
    for turn in zip(*parts, strict=True):
        yield [split_tokens(part, plan.cp, plan.balance) for part in turn]


def _capacity_bytes(layer: LayerSpec, group: int, turns: Sequence[Turn]) -> int:
    """Return the bytes that tell the ranks of a ring how full shared capacity groups are."""
    rows = [
        (len(ring) - 1) * sum(len(layout.cut(group)) for layout in ring)
        for turn in turns
        for ring in turn
        if groups_span(ring, group)
    ]
    return sum(rows) * layer.experts * _COUNT_BYTES


def _count_bytes(plan: Plan, layer: LayerSpec, turns: Sequence[Turn]) -> int:
    """Return the bytes that tell the owners of experts how many rows will come."""
    chunks = sum(
        dispatch_chunks(plan, max(layout.rows for ring in turn for layout in ring))
        for turn in turns
    )
    groups = plan.stage_ranks // plan.ep
    return groups * (plan.ep - 1) * layer.experts * chunks * _COUNT_BYTES


def _moved_rows(
    plan: Plan,
    lengths: Sequence[int],
    layer: LayerSpec,
    experts: NDArray[np.int32],
    turns: Sequence[Turn],
) -> int:
    """Return how many choices are for an expert on another rank."""
    shares = split(layer.experts, plan.ep)
    owner = np.repeat(np.arange(plan.ep), [last - first for first, last in shares])
    slices = plan.tp * plan.dim // plan.expert_columns
    moved = 0
    for turn in turns:
        rings = (layout.global_rows(lengths) for ring in turn for layout in ring)
        for number, rows in enumerate(rings):
            for part, (first, last) in enumerate(split(len(rows), slices)):
                chosen = experts[rows[first:last]]
                chosen = chosen[chosen >= 0]
                moved += int((owner[chosen] != (number * slices + part) % plan.ep).sum())
    return moved


def _kv_shares(layer: LayerSpec, tp: int) -> list[tuple[int, int]]:
    return [
        (layer.kv_head_of(first), layer.kv_head_of(last - 1) + 1)
        for first, last in split(layer.heads, tp)
    ]
