"""Counts that follow from shapes alone: parameters, flops, and the roofline's limit.

A fused multiply-add is 2 flops. Attention counts the query-key pairs that its masks admit,
S(S+1)/2 for a causal sequence of S tokens. Only linears and attention count: norms, RoPE and
softmax are not useful flops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from pympa.plan.layout import Layout, Piece, split, split_batch
from pympa.plan.mesh import Plan
from pympa.spec import LayerSpec, ModelSpec

Alike = tuple[tuple[tuple[tuple[Piece, ...], tuple[Piece, ...]], int], ...]
"""The queries and keys of one sequence, and the number of sequences with the same positions."""


@lru_cache(maxsize=1 << 17)  # the blocks of a ring of 256 ranks, the same in every layer
def alike_sequences(q: Layout, k: Layout) -> Alike:
    """Return the sequences in both q and k, counting sequences of the same positions together."""
    keys = k.pieces
    return tuple(Counter((pieces, keys[s]) for s, pieces in q.pieces.items() if s in keys).items())


def visible_pairs(q: Layout, k: Layout, causal: bool, window: int | None) -> int:
    """Return the number of (query, key) pairs that are not masked."""
    return sum(
        count * block_pairs(a, b, causal, window)
        for (of_q, of_k), count in alike_sequences(q, k)
        for a in of_q
        for b in of_k
    )


def block_pairs(q: Piece, k: Piece, causal: bool, window: int | None) -> int:
    """Return the number of unmasked pairs of two pieces of one sequence."""
    shift, size = q[0] - k[0], (q[1], k[1])
    if causal:
        hidden = _pairs_at_least(shift, size, window) if window else 0
        return _pairs_at_least(shift, size, 0) - hidden
    if window:
        return _pairs_at_least(shift, size, 1 - window) - _pairs_at_least(shift, size, window)
    return q[1] * k[1]


def _pairs_at_least(shift: int, size: tuple[int, int], distance: int) -> int:
    """Count x < size[0], y < size[1] with shift + x - y >= distance."""
    n, m = size

    def summed(t: int) -> int:  # sum of min(max(u, 0), m) over u <= t
        return t * (t + 1) // 2 if 0 < t <= m else max(t - m, 0) * m + m * (m + 1) // 2 * (t > 0)

    first = shift - distance + 1
    return summed(first + n - 1) - summed(first - 1)


def linear_parameters(spec: ModelSpec, layer: LayerSpec) -> int:
    """Return the number of elements of a block's weight matrices, including all experts."""
    return _parameters(spec, layer, layer.experts)


def active_parameters(spec: ModelSpec, layer: LayerSpec) -> int:
    """Return the number of elements of a block's weight matrices that one token uses."""
    return _parameters(spec, layer, layer.top_k)


def _parameters(spec: ModelSpec, layer: LayerSpec, experts: int) -> int:
    mlp = 3 if layer.gated else 2
    found = attention_parameters(spec, layer)
    if not layer.experts:
        return found + mlp * spec.d_model * layer.mlp_hidden
    hidden = experts * layer.mlp_hidden + layer.shared_width
    gates = layer.experts + layer.shared_gate
    return found + spec.d_model * (gates + mlp * hidden)


def attention_parameters(spec: ModelSpec, layer: LayerSpec) -> int:
    """Return the number of elements of the weight matrices of a block's attention."""
    out = layer.heads * layer.value_dim * spec.d_model
    if layer.latent is None:
        kv = layer.n_kv_heads * (layer.head_dim + layer.value_dim)
        return out + spec.d_model * (layer.heads * layer.head_dim + kv)
    unrotated = layer.head_dim - layer.rotated_dim
    kv_rank, q_rank = layer.latent.kv_rank, layer.latent.q_rank
    q = layer.heads * layer.head_dim * (q_rank or spec.d_model)
    kv = layer.n_kv_heads * (unrotated + layer.value_dim) * kv_rank
    return out + q + kv + spec.d_model * latent_outputs(layer)


def latent_outputs(layer: LayerSpec) -> int:
    """Return the number of outputs of linears that are the same for all heads."""
    if layer.latent is None:
        return 0
    return (layer.latent.q_rank or 0) + layer.latent.kv_rank + layer.rotated_dim


def parameters(spec: ModelSpec) -> int:
    """Return the number of elements of all weight matrices: blocks, embedding and head."""
    tables = (1 if spec.tied_head else 2) * spec.vocabulary * spec.d_model
    return tables + sum(linear_parameters(spec, layer) for layer in spec.blocks)


def step_flops(spec: ModelSpec, lengths: Sequence[int]) -> int:
    """Return the useful flops of one forward pass of a batch, with logits of the last tokens.

    Every token counts `top_k` experts, whether or not a choice is dropped.
    """
    whole = Layout(split_batch(lengths, 1)[0].ranges)
    head = 2 * len(whole.ranges) * spec.vocabulary * spec.d_model
    return head + sum(layer_flops(spec, layer, whole) for layer in spec.blocks)


def layer_flops(spec: ModelSpec, layer: LayerSpec, layout: Layout) -> int:
    """Return the useful flops of one block over the rows of a layout."""
    pairs = visible_pairs(layout, layout, spec.causal, layer.window)
    attention = 2 * pairs * layer.heads * (layer.head_dim + layer.value_dim)
    return 2 * layout.rows * active_parameters(spec, layer) + attention


def performed_flops(spec: ModelSpec, plan: Plan, lengths: Sequence[int]) -> int:
    """Return the flops of linears and attention that all ranks of a plan do in a step.

    These are more than `step_flops` if ranks repeat work: keys and values of kv heads that several
    tp ranks need, latents, scores with dim_algo=gather, and gates on each rank of a group with the
    same rows.
    """
    whole = Layout(split_batch(lengths, 1)[0].ranges)
    extra = 0
    for layer in spec.blocks:
        shares = split(layer.heads, plan.tp)
        kv_heads = sum(layer.kv_head_of(b - 1) + 1 - layer.kv_head_of(a) for a, b in shares)
        twice = (kv_heads - layer.n_kv_heads) * (layer.head_dim + layer.value_dim)
        if layer.latent is not None:  # its heads are split evenly; ranks of dim share what rotates
            twice = (plan.tp * plan.dim - 1) * (latent_outputs(layer) - layer.rotated_dim)
            twice += (plan.tp - 1) * layer.rotated_dim
        gates = plan.degree("columns") if layer.capacity_group else plan.expert_columns
        if layer.experts:
            twice += (gates - 1) * layer.experts + (plan.expert_columns - 1) * layer.shared_gate
        extra += 2 * whole.rows * spec.d_model * twice
        if plan.dim > 1 and plan.dim_algo == "gather":
            pairs = visible_pairs(whole, whole, spec.causal, layer.window)
            extra += 2 * pairs * layer.heads * layer.head_dim * (plan.dim - 1)
    return step_flops(spec, lengths) + extra


def roofline_seconds(
    spec: ModelSpec,
    lengths: Sequence[int],
    itemsize: int,
    *,
    flops_per_second: float,
    bytes_per_second: float,
    cores: int,
) -> float:
    """Return the least time of a step on `cores` cores (Williams et al. 2009).

    It is the longer of computing at the peak of all cores, and reading the weights once at their
    bandwidth.
    """
    compute = step_flops(spec, lengths) / (flops_per_second * cores)
    read = parameters(spec) * itemsize / (bytes_per_second * cores)
    return max(compute, read)
