"""Calls of kernels as a cost model gets them: sizes without arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pympa.plan.layout import Range


class GemmCall(NamedTuple):
    """One call of linear products `[m, k] x [k, n]`, with one product for each m of `rows`.

    Attributes:
        rows: the numbers of rows of the products.
        n: the number of outputs.
        k: the number of inputs.
        activation: the name of the activation function.
        gated: whether each product is two products of the same rows.
        nbytes: the bytes that are read and written.
        weight_bytes: the bytes of all weights of the rank.
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
        """The number of columns of the products of a row."""
        return 2 * self.n if self.gated else self.n


class AttentionCall(NamedTuple):
    """One call of attention.

    Attributes:
        q: the ranges of queries: bytes of int64 `[n, 3]`, see `Layout.array`.
        k: the ranges of keys, in the same form.
        causal: whether the mask is causal.
        window: the window of the mask; None for no window.
        heads: the number of query heads.
        kv_heads: the number of heads of keys and values.
        head_dim: the dimension of the heads of queries and keys.
        v_head_dim: the dimension of the heads of values.
        nbytes: the bytes that are read and written.
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
