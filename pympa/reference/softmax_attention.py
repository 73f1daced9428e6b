"""Softmax attention by its formula, over the keys that are visible (Vaswani et al. 2017)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.reference.formulas import F64, Rounding, exactly

MOST_SCORES = 1 << 21  # of a block of queries and keys, unless one query sees more keys
_FEW_ROWS, _MOST_ROWS = 128, 4096  # of a block: fewer are slow, for Python has work with each


def attention(
    q: F64,
    k: F64,
    v: F64,
    q_positions: NDArray[Any],
    k_positions: NDArray[Any],
    *,
    kv_head_of_q: list[int],
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    rounding: Rounding = exactly,
) -> tuple[F64, F64]:
    """Return softmax attention of one sequence, and its log-sum-exp.

    Args:
        q: `[rows, heads, head_dim]`.
        k: `[keys, kv_heads, head_dim]`.
        v: `[keys, kv_heads, v_head_dim]`.
        q_positions: position of each query row in the sequence.
        k_positions: position of each key.
        kv_head_of_q: kv head of each query head.
        scale: factor on q·k.
        causal: hide keys after the query.
        window: hide keys `window` or more positions away; None hides none.
        softcap: cap on scores; None means none.
        rounding: of the weights, before their sum is taken, and of sums.

    Returns:
        o `[rows, heads, dv]` and lse `[rows, heads]`; a row that sees no key gives 0 and -inf.
    """
    o = np.zeros((q.shape[0], q.shape[1], v.shape[2]))
    lse = np.full(q.shape[:2], -np.inf)
    q_positions, k_positions = np.asarray(q_positions), np.asarray(k_positions)
    if (np.diff(k_positions) < 0).any():
        order = np.argsort(k_positions)
        k, v, k_positions = k[order], v[order], k_positions[order]
    for rows, keys in visible_blocks(q_positions, k_positions, causal, window):
        distance = q_positions[rows, None] - k_positions[None, keys]
        hidden = np.zeros(distance.shape, bool)
        if causal:
            hidden |= distance < 0
        if window is not None:
            hidden |= np.abs(distance, out=distance) >= window
        sees = ~hidden.all(axis=1)
        if not sees.any():
            continue
        for head, kv_head in enumerate(kv_head_of_q):
            scores = rounding.product(q[rows, head], k[keys, kv_head].T)
            scores *= scale
            if softcap is not None:
                scores /= softcap
                np.tanh(scores, out=scores)
                scores *= softcap
            scores[hidden] = -np.inf
            top = scores.max(axis=1, keepdims=True)
            top[~sees] = 0.0
            scores -= top
            scores = rounding(np.exp(scores, out=scores))
            total = scores.sum(axis=1, keepdims=True)
            total[~sees] = 1.0
            o[rows, head] = _weighed(scores, v[keys, kv_head], hidden, rounding) / total
            lse[rows, head] = np.where(sees, (top + np.log(total))[:, 0], -np.inf)
    return o, lse


def _weighed(weights: F64, values: F64, hidden: NDArray[np.bool_], rounding: Rounding) -> F64:
    """Return weights @ values, where a hidden value is none at all: 0 times infinity is no 0."""
    broken = ~np.isfinite(values)
    if not broken.any():
        return rounding.product(weights, values)
    found = rounding.product(weights, np.where(broken, 0.0, values))
    for key in np.flatnonzero(broken.any(axis=1)):
        sees = ~hidden[:, key]
        found[sees] += weights[sees, key, None] * np.where(broken[key], values[key], 0.0)
    return found


def visible_blocks(
    q_positions: NDArray[Any], k_positions: NDArray[Any], causal: bool, window: int | None
) -> Iterator[tuple[slice, slice]]:
    """Cut queries into blocks of rows; yield these and the keys from the first to the last seen.

    A block has at most `MOST_SCORES` scores, or one row; with a window its rows see about as many
    keys as there are rows, so that it is no more than twice the work of what is visible.

    Args:
        q_positions: of the queries.
        k_positions: of the keys, ascending.
        causal: see `attention`.
        window: see `attention`.
    """

    def keys_of(positions: NDArray[Any]) -> tuple[int, int]:
        low, high = positions.min(), positions.max()
        first, last = 0, len(k_positions)
        if window is not None:
            first = int(np.searchsorted(k_positions, low - window, "right"))
            last = int(np.searchsorted(k_positions, high + window, "left"))
        if causal:
            last = int(np.searchsorted(k_positions, high, "right"))
        return first, max(first, last)

    most = _MOST_ROWS if window is None else max(window, _FEW_ROWS)
    start = 0
    while start < len(q_positions):
        left = q_positions[start : start + min(most, MOST_SCORES)]

        def scores(count: int, left: NDArray[Any] = left) -> int:
            first, last = keys_of(left[:count])
            return count * (last - first)

        count = bisect_right(range(2, len(left) + 1), MOST_SCORES, key=scores) + 1
        yield slice(start, start + count), slice(*keys_of(left[:count]))
        start += count
