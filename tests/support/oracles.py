"""The float64 oracle of attention for a whole batch, whatever ranks its rows lie on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

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
