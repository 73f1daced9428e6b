"""Which layers each pipeline stage gets: contiguous ones, so that the slowest stage is fast.

By dynamic programming over the boundaries between layers (linear partitioning; Skiena, The
Algorithm Design Manual, section 10.7), as the layers of one model differ: some have experts, a
window or fewer heads. A stage costs its flops. Embedding and head cost none worth counting (a
gather, and the logits of last tokens only), but their weights count where bytes are limited.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from pympa.accounting import layer_flops
from pympa.layout import Layout, Range, Span, split
from pympa.mesh import Plan, PlanError
from pympa.spec import LayerSpec, ModelSpec

DEFAULT_CONTEXT = 4096
"""Tokens of the sequence that attention is weighed by where no batch is known."""

Bounds = tuple[Span, ...]
"""(start, stop) of the layers of each stage."""

_Cost = Callable[[int, int, int], float]
"""Of layers first..last on a stage; infinite where they may not be."""


def stage_bounds(
    spec: ModelSpec,
    plan: Plan,
    context: int = DEFAULT_CONTEXT,
    *,
    itemsize: int,
    limit_bytes: int | None = None,
) -> Bounds:
    """Return the layers of each stage of a plan.

    The slowest stage takes the fewest flops possible. Among such partitions the most even one is
    taken, and of several the one whose first stages are longest, so that layers that are all alike
    are cut as `layout.split` cuts them.

    Args:
        spec: the model.
        plan: its pp is the number of stages; its other degrees split a layer's weights.
        context: tokens of the sequence that attention is weighed by.
        itemsize: bytes of an element of a weight.
        limit_bytes: of weight matrices on any rank; None means no limit.

    Raises:
        PlanError: there are fewer layers than stages, or no partition meets the limit.
    """
    layers, stages = len(spec.blocks), plan.pp
    if stages > layers:
        raise PlanError(f"pp={stages} stages need at least as many layers; the model has {layers}")
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
            f"plan {plan}: however {layers} layers are cut into pp={stages} stages, some rank "
            f"holds at least {needed:,} bytes of weights; {limit_bytes:,} are allowed: allow "
            "more, or split layers over more tp, dim or ep"
        )
    return _partition(layers, stages, unevenness, lambda a, b: a + b)[1]


def rank_parameters(spec: ModelSpec, layer: LayerSpec, plan: Plan) -> int:
    """Return the elements of a block's weight matrices that a rank holds at most.

    Where nothing divides evenly, the largest shares may lie on different ranks.
    """
    shares = split(layer.heads, plan.tp)
    heads = max(last - first for first, last in shares)
    kv_heads = max(
        layer.kv_head_of(last - 1) + 1 - layer.kv_head_of(first) for first, last in shares
    )
    pairs = layer.rotated_dim // 2  # RoPE turns two dimensions together: they stay together
    qk_width = 2 * _share(pairs, plan.dim) + _share(layer.head_dim - 2 * pairs, plan.dim)
    attention = (heads + kv_heads) * (qk_width + _share(layer.value_dim, plan.dim))
    columns, expert_columns = plan.tp * plan.dim, plan.expert_columns
    if layer.experts:
        experts = _share(layer.experts, plan.ep) * _share(layer.mlp_hidden, expert_columns)
        shared = _share(layer.shared_experts * layer.mlp_hidden, expert_columns)
        hidden, router = experts + shared, layer.experts
    else:
        hidden, router = _share(layer.mlp_hidden, columns), 0
    return spec.d_model * (attention + router + (3 if layer.gated else 2) * hidden)


def _held_bytes(spec: ModelSpec, plan: Plan, itemsize: int) -> _Cost:
    """Return the cost that is bytes of weight matrices on a rank, embedding and head included."""
    blocks = _sums([rank_parameters(spec, layer, plan) for layer in spec.blocks])
    table = _share(spec.vocabulary, plan.tp * plan.dim) * spec.d_model

    def held(stage: int, first: int, last: int) -> float:
        tables = (stage == 0) + (stage == plan.pp - 1)
        return itemsize * (blocks(first, last) + tables * table)

    return held


def _partition(
    layers: int, stages: int, cost: _Cost, join: Callable[[float, float], float]
) -> tuple[float, Bounds]:
    """Return the least joined cost of cutting layers into stages, and the cut that has it.

    Ties go to the longest first stage, and so on for the stages after it.
    """
    best: dict[int, tuple[float, Bounds]] = {layers: (0, ())}
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
    """Return what gives the sum of values first..last."""
    totals = [0, *itertools.accumulate(values)]
    return lambda first, last: totals[last] - totals[first]


def _share(total: int, parts: int) -> int:
    """Return the largest part of an even split."""
    return -(-total // parts)
