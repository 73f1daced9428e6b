"""Softmax attention by its formula, over the visible keys (Vaswani et al. 2017)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.verify.reference.formulas import F64, Rounding, exactly

MOST_SCORES = 1 << 21  # of a block of queries and keys, unless one query sees more keys
FEW_ROWS, _MOST_ROWS = 128, 4096  # rows of a block; smaller blocks are slow in Python


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
    sinks: F64 | None = None,
    rounding: Rounding = exactly,
) -> tuple[F64, F64]:
    """Return softmax attention of one sequence, and its log-sum-exp.

    Args:
        q: the queries `[rows, heads, head_dim]`.
        k: the keys `[keys, kv_heads, head_dim]`.
        v: the values `[keys, kv_heads, v_head_dim]`.
        q_positions: the position of each query row in the sequence.
        k_positions: the position of each key.
        kv_head_of_q: the kv head of each query head.
        scale: the factor on q·k.
        causal: whether keys after the query are hidden.
        window: the distance, in positions, from which on keys are hidden; None for no window.
        softcap: the cap on scores; None means no cap.
        sinks: the score of one more key for each head, which has no value `[heads]`; or None.
        rounding: the rounding of the weights, before they are summed, and of sums.

    Returns:
        The output o `[rows, heads, dv]` and lse `[rows, heads]`; a row without visible keys gives
        0, and -inf or its sink.
    """
    o = np.zeros((q.shape[0], q.shape[1], v.shape[2]))
    lse = np.full(q.shape[:2], -np.inf)
    if sinks is not None:
        lse[:] = sinks
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
            if sinks is not None:
                top = np.maximum(top, sinks[head])
            top[~sees] = 0.0
            scores -= top
            scores = rounding(np.exp(scores, out=scores))
            total = scores.sum(axis=1, keepdims=True)
            if sinks is not None:
                total += np.exp(sinks[head] - top)
            total[~sees] = 1.0
            o[rows, head] = _weighed(scores, v[keys, kv_head], hidden, rounding) / total
            lse[rows, head] = np.where(sees, (top + np.log(total))[:, 0], lse[rows, head])
    return o, lse


def _weighed(weights: F64, values: F64, hidden: NDArray[np.bool_], rounding: Rounding) -> F64:
    """Return weights @ values without hidden values: 0 times infinity would not be 0."""
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
    """Cut queries into blocks of rows; yield the rows and the keys from the first to the last seen.

    A block has at most `MOST_SCORES` scores, or one row. With a window its rows see about as many
    keys as it has rows, so its work is at most twice that of the visible pairs.

    Args:
        q_positions: the positions of the queries.
        k_positions: the positions of the keys, ascending.
        causal: whether the mask is causal, see `attention`.
        window: the window, see `attention`.
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

    most = _MOST_ROWS if window is None else max(window, FEW_ROWS)
    start = 0
    while start < len(q_positions):
        left = q_positions[start : start + min(most, MOST_SCORES)]

        def scores(count: int, left: NDArray[Any] = left) -> int:
            first, last = keys_of(left[:count])
            return count * (last - first)

        count = bisect_right(range(2, len(left) + 1), MOST_SCORES, key=scores) + 1
        yield slice(start, start + count), slice(*keys_of(left[:count]))
        start += count
