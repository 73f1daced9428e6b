"""Counts that follow from shapes alone: parameters, flops, bytes sent, what the roofline allows.

A fused multiply-add is 2 flops. Attention counts the query-key pairs that its masks let through,
S(S+1)/2 for a causal sequence of S tokens, and only linears and attention: norms, RoPE and softmax
are not useful flops.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pympa.layout import Layout, split, split_batch, split_micro_batches, streams_tokens
from pympa.mesh import Plan
from pympa.spec import LayerSpec, ModelSpec


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
    """Return the elements of a block's weight matrices."""
    kv = layer.n_kv_heads * (layer.head_dim + layer.value_dim)
    attention = spec.d_model * (layer.heads * (layer.head_dim + layer.value_dim) + kv)
    return attention + (3 if layer.gated else 2) * spec.d_model * layer.mlp_hidden


def parameters(spec: ModelSpec) -> int:
    """Return the elements of all weight matrices: blocks, embedding and head."""
    tables = (1 if spec.tied_head else 2) * spec.vocabulary * spec.d_model
    return tables + sum(linear_parameters(spec, layer) for layer in spec.blocks)


def step_flops(spec: ModelSpec, lengths: Sequence[int]) -> int:
    """Return the useful flops of one forward pass of a batch, with logits of the last tokens."""
    whole = Layout(split_batch(lengths, 1)[0].ranges)
    head = 2 * len(whole.ranges) * spec.vocabulary * spec.d_model
    return head + sum(
        2 * whole.rows * linear_parameters(spec, layer)
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


def bytes_sent(
    spec: ModelSpec, plan: Plan, lengths: Sequence[int], itemsize: int
) -> dict[str, int]:
    """Return the bytes that all ranks together send in a step, by axis, in closed form.

    tp: each of the 2·layers branches and the embedding is summed by reduce-scatter and all-gather,
    2(p-1) times its size. pp: each boundary passes the residual stream once in every tp rank.
    cp: each K/V block visits the other p-1 ranks; kept K/V travel again with every token chunk.
    Holds for the ring without a sliding window.
    """
    tokens = sum(lengths)
    stream = tokens * spec.d_model * itemsize
    sent = {"pp": 0, "cp": 0, "tp": 0}
    sent["tp"] = 2 * (plan.tp - 1) * stream * (2 * len(spec.blocks) + 1)
    sent["pp"] = (plan.pp - 1) * plan.tp * stream
    travelling_rows = 0
    for group in split_batch(lengths, plan.dp):
        chunks = split_micro_batches(group, plan.micro_batches)
        kept = 0
        for chunk in chunks:
            kept = kept + chunk.rows if streams_tokens(group, plan.micro_batches) else chunk.rows
            travelling_rows += kept
    for layer in spec.blocks:
        heads = sum(kv_last - kv_first for kv_first, kv_last in _kv_shares(layer, plan.tp))
        row = heads * (layer.head_dim + layer.value_dim) * itemsize
        sent["cp"] += (plan.cp - 1) * travelling_rows * row
    return {axis: count for axis, count in sent.items() if count}


def _kv_shares(layer: LayerSpec, tp: int) -> list[tuple[int, int]]:
    return [
        (layer.kv_head_of(first), layer.kv_head_of(last - 1) + 1)
        for first, last in split(layer.heads, tp)
    ]
