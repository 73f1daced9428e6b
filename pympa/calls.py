"""Calls of kernels as a cost model sees them: sizes, no arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pympa.layout import Range


class Multiplied(NamedTuple):
    """One call of linear products `[m, k] x [k, n]`, one for each m of `rows`.

    gated: each is two, of the same rows. nbytes: that are read and written.
    weight_bytes: of all weights of the rank.
    """

    rows: tuple[int, ...]
    n: int
    k: int
    activation: str
    gated: bool
    nbytes: int
    weight_bytes: int

    @property
    def outputs(self) -> int:
        """Columns of the products of a row."""
        return 2 * self.n if self.gated else self.n


class Attended(NamedTuple):
    """One call of attention.

    q, k: ranges of queries and keys: bytes of int64 `[n, 3]`, see `Layout.array`.
    causal, window: the mask, None for no window.
    heads, kv_heads, head_dim, v_head_dim: of the arrays. nbytes: that are read and written.
    """

    q: bytes
    k: bytes
    causal: bool
    window: int | None
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    nbytes: int


def ranges_of(ranges: bytes) -> list[Range]:
    """Return the ranges of a layout from its bytes."""
    return [Range(*r) for r in np.frombuffer(ranges, np.int64).reshape(-1, 3).tolist()]
