"""The choice of experts, and the expert branch of a block, by the formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.spec import LayerSpec
from pympa.verify.reference.formulas import F64, Rounding, exactly, linear, mlp, sigmoid
from pympa.verify.reference.rows import (
    Weight,
    after_branch,
    before_branch,
    for_row_blocks,
    once,
    row_blocks,
    widest,
)

_LEAST_SUM = 1e-20  # added to the sum of sigmoid scores (DeepSeek-V3's code)


def gate_values(
    layer: LayerSpec, x: F64, weight: Weight, rounding: Rounding = exactly
) -> tuple[F64, F64]:
    """Return the values by which experts are chosen, and how an error of the input changes them.

    Args:
        layer: the block.
        x: the residual stream `[rows, d_model]`.
        weight: a function from a name inside the block to a float64 array.
        rounding: the rounding, see `pympa.verify.reference.model`.

    Returns:
        The values `[rows, experts]`, see `choice_values`; and `[rows]` a bound of the deviation of
        a value if the whole input had an error of its own size in a random direction: for a logit
        |input| |router row| / sqrt(d_model), for a score that times the steepest slope: a quarter
        for a sigmoid. Of a softmax score p over all logits it is p sqrt((1-p)² + Σ q²), with the
        other scores q, at most sqrt(2) p (1-p) and so sqrt(2)/4: two experts with 1/2 each.
    """
    weight = once(weight)
    values, sensitivity = np.empty((len(x), layer.experts)), np.empty(len(x))
    slope = 1.0
    if not layer.routing.by_logits:
        slope = 0.25 if layer.routing.score == "sigmoid" else math.sqrt(2.0) / 4.0
    router = weight("router")
    for here in row_blocks(len(x), widest(layer, x.shape[1])):
        normed = before_branch(layer, x[here], weight, "mlp", rounding)
        values[here] = choice_values(layer, _logits(layer, normed, weight, rounding), weight)
        sensitivity[here] = slope * np.sqrt((normed**2).sum(axis=1) * (router**2).mean())
    return values, sensitivity


def choice_values(layer: LayerSpec, logits: F64, weight: Weight) -> F64:
    """Return the values by which experts are chosen: logits, or scores with the choice bias."""
    routing = layer.routing
    if routing.by_logits:
        return logits
    values = _scores(layer, logits)
    return values + weight("choice_bias") if routing.choice_bias else values


def _logits(layer: LayerSpec, normed: F64, weight: Weight, rounding: Rounding) -> F64:
    bias = weight("router_bias") if layer.has_router_bias else None
    return linear(normed, weight("router"), bias, rounding)


def _scores(layer: LayerSpec, logits: F64) -> F64:
    """Return the scores of experts: sigmoids, or the softmax over all experts."""
    if layer.routing.score == "sigmoid":
        return sigmoid(logits)
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: F64 = exponents / exponents.sum(axis=1, keepdims=True)
    return shares


def group_values(layer: LayerSpec, values: F64) -> F64:
    """Return the values of groups of experts, `[rows, groups]`."""
    groups = np.sort(values.reshape(len(values), layer.routing.groups, -1), axis=2)
    return groups[..., -2:].sum(axis=2) if layer.routing.group_score == "top2" else groups[..., -1]


def choose(layer: LayerSpec, values: F64) -> NDArray[np.int64]:
    """Return the experts of each row by `choice_values`, ascending; ties: the lower id or group."""
    routing = layer.routing
    if routing.chosen_groups == routing.groups:
        return largest(values, layer.top_k)
    best = largest(group_values(layer, values), routing.chosen_groups)
    allowed = np.zeros((len(values), routing.groups), bool)
    np.put_along_axis(allowed, best, True, axis=1)
    members = np.repeat(allowed, layer.experts // routing.groups, axis=1)
    return largest(np.where(members, values, -np.inf), layer.top_k)


def largest(values: F64, count: int) -> NDArray[np.int64]:
    """Return the ids of the `count` largest values in each row, ascending; ties: the lower id."""
    chosen = np.empty((len(values), count), np.int64)
    for here in row_blocks(*values.shape):
        order = np.argsort(-values[here], axis=1, kind="stable")
        chosen[here] = np.sort(order[:, :count], axis=1)
    return chosen


def kept(layer: LayerSpec, chosen: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which choices of one whole sequence are within the experts' capacity.

    Args:
        layer: the block.
        chosen: the expert ids `[tokens, top_k]`.
    """
    keep = np.ones(chosen.shape, bool)
    group = layer.capacity_group
    if group is None:
        return keep
    for start in range(0, len(chosen), group):
        rows = chosen[start : start + group]
        room = [layer.capacity(len(rows))] * layer.experts
        for row, experts in enumerate(rows.tolist()):
            for k, expert in enumerate(experts):
                keep[start + row, k] = room[expert] > 0
                room[expert] -= 1
    return keep


def moe_branch(
    layer: LayerSpec,
    x: F64,
    weight: Weight,
    chosen: NDArray[Any],
    keep: NDArray[np.bool_],
    rounding: Rounding = exactly,
) -> F64:
    """Return the expert branch before the residual, `[rows, d_model]`.

    Args:
        layer: the block.
        x: the residual stream `[rows, d_model]`.
        weight: a function from a name inside the block to a float64 array.
        chosen: the expert ids of each row `[rows, top_k]`.
        keep: the mask of the choices that are not dropped, bool `[rows, top_k]`.
        rounding: the rounding, see `pympa.verify.reference.model`.
    """
    weight_of, width = once(weight), widest(layer, x.shape[1])
    shares, shared = np.empty(chosen.shape), np.ones(len(x))
    for here in row_blocks(len(x), width):
        normed = before_branch(layer, x[here], weight_of, "mlp", rounding)
        scores = _scores(layer, _logits(layer, normed, weight_of, rounding))
        shares[here] = _shares(layer, scores, chosen[here])
        if layer.shared_gate:
            shared[here] = sigmoid(linear(normed, weight_of("shared_gate"), None, rounding))[:, 0]
    out = np.zeros_like(x)

    def add(name: str, rows: NDArray[Any], share: F64) -> None:
        own = once(weight)

        def work(here: slice) -> None:
            normed = before_branch(layer, x[rows[here]], own, "mlp", rounding)
            out[rows[here]] += share[here, None] * named_mlp(layer, normed, own, name, rounding)

        for_row_blocks(len(rows), width, rounding, work)

    for expert in np.unique(chosen[keep]):
        rows, k = np.nonzero((chosen == expert) & keep)
        add(f"experts.{expert}", rows, shares[rows, k])
    if layer.shared_experts:
        add("shared", np.arange(len(x)), shared)
    return after_branch(layer, out, weight_of, "mlp", rounding)


def _shares(layer: LayerSpec, scores: F64, chosen: NDArray[Any]) -> F64:
    """Return the weights of chosen experts."""
    shares: F64 = np.take_along_axis(scores, chosen, axis=1)
    if layer.renormalize:
        least = _LEAST_SUM if layer.routing.score == "sigmoid" else 0.0
        shares = shares / (shares.sum(axis=1, keepdims=True) + least)
    return shares * layer.routing.scale


def mlp_branch(layer: LayerSpec, x: F64, weight: Weight, rounding: Rounding = exactly) -> F64:
    """Return the MLP branch before the residual, `[rows, d_model]`."""
    weight, out = once(weight), np.empty_like(x)

    def work(here: slice) -> None:
        normed = before_branch(layer, x[here], weight, "mlp", rounding)
        y = named_mlp(layer, normed, weight, "mlp", rounding)
        out[here] = after_branch(layer, y, weight, "mlp", rounding)

    for_row_blocks(len(x), widest(layer, x.shape[1]), rounding, work)
    return out


def named_mlp(layer: LayerSpec, normed: F64, weight: Weight, name: str, rounding: Rounding) -> F64:
    """Return the output of an MLP, by its name in the block, for normed rows `[rows, d_model]`."""

    def bias(kind: str) -> F64 | None:
        return weight(f"{name}.{kind}_bias") if layer.mlp_bias else None

    y = mlp(
        normed,
        weight(f"{name}.up"),
        weight(f"{name}.down"),
        weight(f"{name}.gate") if layer.gated else None,
        layer.activation,
        bias("up"),
        bias("gate") if layer.gated else None,
        bias("down"),
        rounding,
        limit=layer.swiglu_limit,
        alpha=layer.swiglu_alpha,
    )
    return rounding(y)
