"""Plain formulas in float64: attention of a whole batch, RoPE, SwiGLU, the choice of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pympa.spec import Routing
from pympa.verify import reference
from support.compare import Array, wide


def batch_attention(
    q: Array, k: Array, v: Array, lengths: Sequence[int], *, scale: float | None = None, **rule: Any
) -> tuple[Array, Array]:
    """Return o and lse in float64 of sequences that lie one after the other.

    Args:
        q: `[rows, heads, head_dim]`.
        k: `[rows, kv_heads, head_dim]`.
        v: `[rows, kv_heads, v_head_dim]`.
        lengths: of the sequences.
        scale: of scores; None means 1/sqrt(head_dim).
        rule: which keys a row sees; see `reference.attention`.
    """
    o, lse = np.empty((*q.shape[:2], v.shape[2])), np.empty(q.shape[:2])
    for stop, length in zip(np.cumsum(lengths), lengths, strict=True):
        rows, positions = slice(stop - length, stop), np.arange(length)
        o[rows], lse[rows] = reference.attention(
            wide(q[rows]), wide(k[rows]), wide(v[rows]), positions, positions,
            kv_head_of_q=(np.arange(q.shape[1]) * k.shape[1] // q.shape[1]).tolist(),
            scale=q.shape[2] ** -0.5 if scale is None else scale, **rule,
        )  # fmt: skip
    return o, lse


def rotated(x: Array, cos: Array, sin: Array, index: Array, interleaved: bool) -> Array:
    """Return x `[rows, heads, head_dim]` with its pairs rotated, one by one."""
    want, half = wide(x), cos.shape[1]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        c, s = wide(cos)[index, i, None], wide(sin)[index, i, None]
        want[..., a] = wide(x)[..., a] * c - wide(x)[..., b] * s
        want[..., b] = wide(x)[..., b] * c + wide(x)[..., a] * s
    return want


def swiglu_clamped(gate: Array, up: Array, limit: float, alpha: float) -> Array:
    """Return the hidden state of gpt-oss from the sums of its gate and up products."""
    g, u = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return np.asarray(g / (1 + np.exp(-alpha * g)) * (u + 1))


class Choice(NamedTuple):
    """The experts of rows by ascending id, their weights, and the first broken row or -1."""

    experts: Array
    weights: Array
    broken: int = -1


def plain_select(
    logits: Array,
    choices: int,
    routing: Routing,
    bias: Array | None = None,
    *,
    renormalize: bool = False,
) -> Choice:
    """Return the choice of experts by the formulas of `Routing`."""
    x = wide(logits)
    if routing.score == "softmax":
        scores = np.exp(x - x.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-x))
    ranks = x.copy() if routing.by_logits else scores + (0 if bias is None else wide(bias))
    size = x.shape[1] // routing.groups
    grouped = np.sort(ranks.reshape(-1, routing.groups, size), axis=2)
    of_group = grouped[..., -1] if routing.group_score == "largest" else grouped[..., -2:].sum(2)
    dropped = np.argsort(-of_group, axis=1, kind="stable")[:, routing.chosen_groups :]
    np.put_along_axis(ranks.reshape(grouped.shape), dropped[..., None], -np.inf, axis=1)
    experts = np.sort(np.argsort(-ranks, axis=1, kind="stable")[:, :choices], axis=1)
    weights = np.take_along_axis(scores, experts, axis=1)
    if renormalize:
        weights /= weights.sum(axis=1, keepdims=True)
    return Choice(experts, weights * routing.scale)
