"""What calibration runs of each kernel: calls on arrays of their own, at the points of a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pympa.kernels import AttentionSpec, KvBlock, MlpWeights
from pympa.kernels.rig import Rig
from pympa.plan.layout import Layout, Range
from pympa.runtime.arena import Array

POOL_BYTES = 8 << 20
"""The bytes of arrays that calls cycle through: more than a second-level cache."""
GRID = (1, 64, 1024, 8192), (64, 512, 4096)
"""Rows, and bytes of a row."""
_ROPE_HEADS = 8  # heads that share a row of RoPE's tables
HEADS = 4

Run = Callable[[], object]


class Workload(NamedTuple):
    """One curve to measure.

    Attributes:
        curve: the name of the curve.
        sizes: the grid, as `pympa.costs.device_costs` explains.
        make: a function that returns a call with its own arrays at a point of the grid.
        less: a function like `make` whose seconds are subtracted; None subtracts nothing.
        parts: the number by which the seconds of a call are divided.
        pool_bytes: the bytes of the arrays that calls cycle through.
    """

    curve: str
    sizes: tuple[tuple[int, ...], ...]
    make: Callable[..., Run]
    less: Callable[..., Run] | None = None
    parts: int = 1
    pool_bytes: int = POOL_BYTES


def linear(rig: Rig, m: int, n: int, k: int, activation: str = "none") -> Run:
    """Return a product `[m, k] x [k, n]`."""
    x, out = rig.filled(m, k), rig.filled(m, n)
    weight = rig.filled_weight(n, k)
    return lambda: rig.kernels.linear(x, weight, out, activation=activation)


def attention(rig: Rig, rows: int, keys: int, head_dim: int) -> Run:
    """Return attention of `HEADS` adjacent heads in which all rows see all keys."""
    q, k, v = (rig.filled(length, HEADS, head_dim) for length in (rows, keys, keys))
    state = rig.state(rows, head_dim, HEADS)
    layout, block = _layout(rows), KvBlock(k, v, _layout(keys))
    spec = AttentionSpec(np.arange(HEADS, dtype=np.int32), head_dim**-0.5, causal=False)
    return lambda: rig.kernels.attend_block(q, layout, block, state, spec)


def _layout(rows: int) -> Layout:
    return Layout((Range(0, 0, rows),) if rows else ())


def mlp(rig: Rig, rows: int, width: int, hidden: int) -> Run:
    """Return an MLP without a gate `[rows, width]` -> `[rows, hidden]` -> `[rows, width]`."""
    x, out = rig.filled(rows, width), rig.filled(rows, width)
    up = rig.filled_weight(hidden, width)
    down = rig.filled_weight(width, hidden)
    weights = MlpWeights(up, down, "none")
    return lambda: rig.kernels.mlp(x, weights, out)


def sum_squares(rig: Rig, rows: int, row_bytes: int) -> Run:
    """Return the sums of squares of rows."""
    (x,) = _rows(rig, rows, row_bytes, 1)
    out = rig.arena.empty((rows, 1), np.float32)
    return lambda: rig.kernels.sum_squares(x, out)


def softcap(rig: Rig, rows: int, row_bytes: int) -> Run:
    """Return a cap on logits, in place."""
    x = rig.arena.empty((rows, row_bytes // 8), np.float32)
    rig.fill(x)
    return lambda: rig.kernels.softcap(x, 30.0)


def norm(rig: Rig, rows: int, row_bytes: int, kind: str) -> Run:
    """Return a norm; LayerNorm has a bias."""
    x, out = _rows(rig, rows, row_bytes, 2)
    gain = rig.filled(x.shape[1])
    bias = gain if kind == "layer" else None
    return lambda: rig.kernels.norm(x, gain, bias, out, eps=1e-6, kind=kind)


def rope(rig: Rig, rows: int, row_bytes: int) -> Run:
    """Return RoPE of halves, in heads that share rows of the tables."""
    (x,) = _rows(rig, rows, row_bytes, 2, arrays=1)
    heads, half = min(_ROPE_HEADS, rows), x.shape[1] // 2
    whole = x[:, : 2 * half].reshape(rows // heads, heads, 2 * half)
    cos, sin = (rig.arena.empty((len(whole), half), np.float32) for _ in range(2))
    cos.fill(1.0)
    sin.fill(0.0)
    index = np.arange(len(whole), dtype=np.int32)
    return lambda: rig.kernels.rope(whole, cos, sin, index)


def gather_rows(rig: Rig, rows: int, row_bytes: int) -> Run:
    """Return a gather of permuted rows."""
    source, out = _rows(rig, rows, row_bytes, 2)
    index = np.random.default_rng(0).permutation(rows).astype(np.int32)
    return lambda: rig.kernels.gather_rows(source, index, out)


def combine_rows(rig: Rig, rows: int, row_bytes: int) -> Run:
    """Return a call that combines two choices of each row, without a base."""
    (out,) = _rows(rig, rows, row_bytes, 3, arrays=1)
    chosen = rig.filled(2 * rows, out.shape[1])
    inverse = np.random.default_rng(0).permutation(2 * rows).astype(np.int32).reshape(rows, 2)
    weights = np.full((rows, 2), 0.5, np.float32)
    return lambda: rig.kernels.combine_rows(chosen, inverse, weights, None, out)


def add(rig: Rig, rows: int, row_bytes: int) -> Run:
    """Return a sum of two arrays."""
    a, b, out = _rows(rig, rows, row_bytes, 3)
    return lambda: rig.kernels.add(a, b, out)


def sum_partials(rig: Rig, rows: int, row_bytes: int) -> Run:
    """Return a sum of two partials."""
    (out,) = _rows(rig, rows, row_bytes, 3, arrays=1)
    parts = rig.filled(2, *out.shape)
    return lambda: rig.kernels.sum_partials(parts, None, out)


def copy(rig: Rig, rows: int, row_bytes: int) -> Run:
    """Return a copy of slices of rows, as when slices are cut from whole heads."""
    width = max(1, row_bytes // 2 // rig.dtype.itemsize)
    source, out = rig.filled(rows, 2, width)[:, 0], rig.filled(rows, width)
    return lambda: rig.kernels.copy(source, out)


def start_state(rig: Rig, rows: int, row_bytes: int) -> Run:
    """Return the start of a state without sinks."""
    state = rig.state(rows, row_bytes // 4)
    return lambda: rig.kernels.start_state(state)


def finish(rig: Rig, rows: int, row_bytes: int) -> Run:
    """Return the end of a state of one head."""
    state = rig.state(rows, row_bytes // (4 + rig.dtype.itemsize))
    o, lse = rig.filled(*state.out.shape), rig.arena.empty((rows, 1), np.float32)
    return lambda: rig.kernels.finish(state, o, lse)


def merge(rig: Rig, rows: int, row_bytes: int) -> Run:
    """Return a merge of two states of one head."""
    state, other = (rig.state(rows, row_bytes // 12) for _ in range(2))
    return lambda: rig.kernels.merge(state, other)


def select_experts(rig: Rig, rows: int, row_bytes: int) -> Run:
    """Return a choice of two experts by the largest logits."""
    logits = np.random.default_rng(0).standard_normal((rows, row_bytes // 4), np.float32)
    experts, weights = np.empty((rows, 2), np.int32), np.empty((rows, 2), np.float32)
    select = rig.kernels.select_experts
    return lambda: select(logits, experts, weights, renormalize=True)


def sort_rows(rig: Rig, pairs: int, count: int) -> Run:
    """Return a sort of pairs by expert."""
    experts = np.random.default_rng(0).integers(0, count, (pairs, 1)).astype(np.int32)
    sources, inverse = np.empty(pairs, np.int32), np.empty((pairs, 1), np.int32)
    return lambda: rig.kernels.sort_rows(experts, count, sources, inverse)


def _rows(rig: Rig, rows: int, row_bytes: int, parts: int, arrays: int = 0) -> list[Array]:
    """Return arrays `[rows, width]` with `row_bytes` for each row, divided by `parts`."""
    width = max(2, row_bytes // parts // rig.dtype.itemsize)
    return [rig.filled(rows, width) for _ in range(arrays or parts)]


def by_rows(curve: str, make: Callable[..., Run]) -> tuple[Workload, ...]:
    """Return the workload of a kernel that works row by row."""
    return (Workload(curve, GRID, make),)
