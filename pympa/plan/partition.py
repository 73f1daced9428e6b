"""The layers of each pipeline stage: contiguous layers, such that the slowest stage is fast.

The partition is found by dynamic programming over the boundaries between layers (linear
partitioning; Skiena, The Algorithm Design Manual, section 10.7), because the layers of one model
differ: some have experts, a window or fewer heads. The cost of a stage is its flops. The cost of
embedding and head is negligible (a gather, and the logits of last tokens only), but their weights
count if bytes are limited.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from pympa.plan.accounting import layer_flops
from pympa.plan.layout import Bounds, Layout, Range, split
from pympa.plan.mesh import Plan, PlanError
from pympa.spec import LayerSpec, ModelSpec

DEFAULT_CONTEXT = 4096
"""The number of tokens of a sequence for the cost of attention, if no batch is known."""

Stages = tuple[Bounds, ...]
"""The bounds (start, stop) of the layers of each stage."""

_Cost = Callable[[int, int, int], float]
"""A function that returns the cost of layers first..last on a stage; infinite if not allowed."""


def stage_bounds(
    spec: ModelSpec,
    plan: Plan,
    context: int = DEFAULT_CONTEXT,
    *,
    itemsize: int,
    limit_bytes: int | None = None,
) -> Stages:
    """Return the layers of each stage of a plan.

    The slowest stage has the fewest flops possible. Among such partitions the most even one is
    chosen, and among several the one with the longest first stages, so that equal layers are cut as
    by `layout.split`.

    Args:
        spec: the model.
        plan: the plan; its pp is the number of stages, and its other degrees split a layer's
            weights.
        context: the number of tokens of a sequence for the cost of attention.
        itemsize: the bytes of one element of a weight.
        limit_bytes: the largest allowed bytes of weight matrices on any rank; None means no limit.

    Raises:
        PlanError: there are fewer layers than stages, or no partition is within the limit.
    """
    layers, stages = len(spec.blocks), plan.pp
    if stages > layers:
        raise PlanError(f"pp={stages}: expected at most {layers}, because each stage needs a layer")
    held = _held_bytes(spec, plan, itemsize)
    limit = math.inf if limit_bytes is None else limit_bytes
    whole = Layout((Range(0, 0, context),))
    flops = _sums([layer_flops(spec, layer, whole) for layer in spec.blocks])

    def cost(stage: int, first: int, last: int) -> float:
        return flops(first, last) if held(stage, first, last) <= limit else math.inf

    def unevenness(stage: int, first: int, last: int) -> float:
        flops_here = cost(stage, first, last)
        return flops_here**2 if flops_here <= slowest else math.inf

    slowest, _ = _partition(layers, stages, cost, max)
    if slowest == math.inf:
        needed, _ = _partition(layers, stages, held, max)
        raise PlanError(
            f"plan {plan}: weight limit: expected at least {needed:,} bytes, the least that the "
            f"fullest of pp={stages} stages holds; got {limit_bytes:,}; raise the limit, or split "
            "layers over more tp, dim or ep"
        )
    return _partition(layers, stages, unevenness, lambda a, b: a + b)[1]


def rank_parameters(spec: ModelSpec, layer: LayerSpec, plan: Plan) -> int:
    """Return the largest number of elements of a block's weight matrices on a rank.

    If a split is uneven, the largest shares may be on different ranks.
    """
    shares = split(layer.heads, plan.tp)
    heads = max(last - first for first, last in shares)
    kv_heads = max(
        layer.kv_head_of(last - 1) + 1 - layer.kv_head_of(first) for first, last in shares
    )
    pairs = layer.rotated_dim // 2  # RoPE rotates two dimensions together, so they stay together
    rotated, unrotated = 2 * _share(pairs, plan.dim), _share(layer.head_dim - 2 * pairs, plan.dim)
    v_width, d_model = _share(layer.value_dim, plan.dim), spec.d_model
    if layer.latent is None:
        attention = d_model * (heads + kv_heads) * (rotated + unrotated + v_width)
    else:
        q_rank, kv_rank = layer.latent.q_rank, layer.latent.kv_rank
        attention = d_model * ((q_rank or 0) + kv_rank + rotated + heads * v_width)
        attention += heads * (rotated + unrotated) * (q_rank or d_model)
        attention += kv_heads * (unrotated + v_width) * kv_rank
    columns, expert_columns = plan.tp * plan.dim, plan.expert_columns
    if layer.experts:
        experts = _share(layer.experts, plan.ep) * _share(layer.mlp_hidden, expert_columns)
        shared = _share(layer.shared_width, expert_columns)
        hidden, gates = experts + shared, layer.experts + layer.shared_gate
    else:
        hidden, gates = _share(layer.mlp_hidden, columns), 0
    return attention + d_model * (gates + (3 if layer.gated else 2) * hidden)


def _held_bytes(spec: ModelSpec, plan: Plan, itemsize: int) -> _Cost:
    """Return a cost function: bytes of weight matrices on a rank, including embedding and head."""
    blocks = _sums([rank_parameters(spec, layer, plan) for layer in spec.blocks])
    table = _share(spec.vocabulary, plan.tp * plan.dim) * spec.d_model

    def held(stage: int, first: int, last: int) -> float:
        tables = (stage == 0) + (stage == plan.pp - 1)
        return itemsize * (blocks(first, last) + tables * table)

    return held


def _partition(
    layers: int, stages: int, cost: _Cost, join: Callable[[float, float], float]
) -> tuple[float, Stages]:
    """Return the least joined cost of cutting layers into stages, and the cut with that cost.

    Ties go to the longest first stage, and so on for the stages after it.
    """
    best: dict[int, tuple[float, Stages]] = {layers: (0, ())}
    for stage in reversed(range(stages)):
        after, best = best, {}
        for first in range(stage, layers - (stages - 1 - stage)):
            options = [
                (join(cost(stage, first, last), value), -last)
                for last, (value, _) in after.items()
                if last > first
            ]
            value, last = min(options)
            best[first] = value, ((first, -last), *after[-last][1])
    return best[0]


def _sums(values: Sequence[int]) -> Callable[[int, int], int]:
    """Return a function that sums values first..last."""
    totals = [0, *itertools.accumulate(values)]
    return lambda first, last: totals[last] - totals[first]


def _share(total: int, parts: int) -> int:
    """Return the largest part of an even split."""
    return -(-total // parts)
