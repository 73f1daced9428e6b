"""What calibration runs: each kernel over a grid of sizes, as a strategy would call it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from pympa.arena import Array
from pympa.calibrate.stopwatch import POOL_BYTES, Bench
from pympa.kernels import AttentionSpec, KvBlock, MlpWeights
from pympa.layout import Layout, Range

Run = Callable[[], object]


class Workload(NamedTuple):
    """One curve to measure.

    Attributes:
        kernel: its name. sizes: the grid, as `pympa.costs` explains.
        make: returns a call on arrays of its own at a point of the grid.
        less: measured the same way and subtracted; None for nothing.
        parts: that the seconds of a call are divided by.
        pool_bytes: of arrays that `make`'s calls go round, see `Bench.seconds`.
    """

    kernel: str
    sizes: tuple[tuple[int, ...], ...]
    make: Callable[..., Run]
    less: Callable[..., Run] | None = None
    parts: int = 1
    pool_bytes: int = POOL_BYTES


_ROWS, _ROW_BYTES = (1, 64, 1024, 8192), (64, 512, 4096)
_ROPE_HEADS = 8  # that share a row of RoPE's tables
HEADS = 4
_MEMORY_BYTES = 96 << 20  # more than a third-level cache
_ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
_EXPERTS = (4, 64)


def linear(bench: Bench, m: int, n: int, k: int, activation: str = "none") -> Run:
    """Return a product `[m, k] x [k, n]`."""
    x, out = bench.filled(m, k), bench.filled(m, n)
    weight = bench.kernels.pack((n, k), bench.dtype, bench.fill)
    return lambda: bench.kernels.linear(x, weight, out, activation=activation)


def attention(bench: Bench, rows: int, keys: int, head_dim: int) -> Run:
    """Return attention of `HEADS` heads that lie side by side, in which all rows see all keys."""
    q, k, v = (bench.filled(length, HEADS, head_dim) for length in (rows, keys, keys))
    state = bench.state(rows, head_dim, HEADS)
    layout, block = _layout(rows), KvBlock(k, v, _layout(keys))
    spec = AttentionSpec(np.arange(HEADS, dtype=np.int32), head_dim**-0.5, causal=False)
    return lambda: bench.kernels.attend_block(q, layout, block, state, spec)


def _no_attention(bench: Bench, *_: int) -> Run:
    return attention(bench, 0, 0, 16)


def _layout(rows: int) -> Layout:
    return Layout((Range(0, 0, rows),) if rows else ())


def _mlp(bench: Bench, rows: int, width: int, hidden: int) -> Run:
    x, out = bench.filled(rows, width), bench.filled(rows, width)
    up = bench.kernels.pack((hidden, width), bench.dtype, bench.fill)
    down = bench.kernels.pack((width, hidden), bench.dtype, bench.fill)
    weights = MlpWeights(up, down, "none")
    return lambda: bench.kernels.mlp(x, weights, out)


def _norm(bench: Bench, rows: int, row_bytes: int, kind: str) -> Run:
    x, out = _rows(bench, rows, row_bytes, 2)
    gain = bench.filled(x.shape[1])
    bias = gain if kind == "layer" else None
    return lambda: bench.kernels.norm(x, gain, bias, out, eps=1e-6, kind=kind)


def _rope(bench: Bench, rows: int, row_bytes: int) -> Run:
    (x,) = _rows(bench, rows, row_bytes, 2, arrays=1)
    heads, half = min(_ROPE_HEADS, rows), x.shape[1] // 2
    whole = x[:, : 2 * half].reshape(rows // heads, heads, 2 * half)
    cos, sin = (bench.arena.empty((len(whole), half), np.float32) for _ in range(2))
    cos.fill(1.0)
    sin.fill(0.0)
    index = np.arange(len(whole), dtype=np.int32)
    return lambda: bench.kernels.rope(whole, cos, sin, index)


def _gather(bench: Bench, rows: int, row_bytes: int) -> Run:
    source, out = _rows(bench, rows, row_bytes, 2)
    index = np.random.default_rng(0).permutation(rows).astype(np.int32)
    return lambda: bench.kernels.gather_rows(source, index, out)


def _combine(bench: Bench, rows: int, row_bytes: int) -> Run:
    """Two choices of each row, without a base."""
    (out,) = _rows(bench, rows, row_bytes, 3, arrays=1)
    chosen = bench.filled(2 * rows, out.shape[1])
    places = np.random.default_rng(0).permutation(2 * rows).astype(np.int32).reshape(rows, 2)
    weights = np.full((rows, 2), 0.5, np.float32)
    return lambda: bench.kernels.combine_rows(chosen, places, weights, None, out)


def _add(bench: Bench, rows: int, row_bytes: int) -> Run:
    a, b, out = _rows(bench, rows, row_bytes, 3)
    return lambda: bench.kernels.add(a, b, out)


def _sum(bench: Bench, rows: int, row_bytes: int) -> Run:
    (out,) = _rows(bench, rows, row_bytes, 3, arrays=1)
    parts = bench.filled(2, *out.shape)
    return lambda: bench.kernels.sum_partials(parts, None, out)


def _copy(bench: Bench, rows: int, row_bytes: int) -> Run:
    """Slices of rows, as they are cut from whole heads."""
    width = max(1, row_bytes // 2 // bench.dtype.itemsize)
    source, out = bench.filled(rows, 2, width)[:, 0], bench.filled(rows, width)
    return lambda: bench.kernels.copy(source, out)


def _start_state(bench: Bench, rows: int, row_bytes: int) -> Run:
    state = bench.state(rows, row_bytes // 4)
    return lambda: bench.kernels.start_state(state)


def _finish(bench: Bench, rows: int, row_bytes: int) -> Run:
    state = bench.state(rows, row_bytes // (4 + bench.dtype.itemsize))
    o, lse = bench.filled(*state.out.shape), bench.arena.empty((rows, 1), np.float32)
    return lambda: bench.kernels.finish(state, o, lse)


def _merge(bench: Bench, rows: int, row_bytes: int) -> Run:
    state, other = (bench.state(rows, row_bytes // 12) for _ in range(2))
    return lambda: bench.kernels.merge(state, other)


def _select(bench: Bench, rows: int, row_bytes: int) -> Run:
    logits = np.random.default_rng(0).standard_normal((rows, row_bytes // 4), np.float32)
    experts, weights = np.empty((rows, 2), np.int32), np.empty((rows, 2), np.float32)
    select = bench.kernels.select_experts
    return lambda: select(logits, experts, weights, renormalize=True)


def _sort(bench: Bench, pairs: int, count: int) -> Run:
    experts = np.random.default_rng(0).integers(0, count, (pairs, 1)).astype(np.int32)
    sources, places = np.empty(pairs, np.int32), np.empty((pairs, 1), np.int32)
    return lambda: bench.kernels.sort_rows(experts, count, sources, places)


def _rows(bench: Bench, rows: int, row_bytes: int, parts: int, arrays: int = 0) -> list[Array]:
    """Return arrays `[rows, width]` that have so many bytes for each row, a part each."""
    width = max(2, row_bytes // parts // bench.dtype.itemsize)
    return [bench.filled(rows, width) for _ in range(arrays or parts)]


def _by_rows(kernel: str, make: Callable[..., Run]) -> Workload:
    return Workload(kernel, (_ROWS, _ROW_BYTES), make)


WORKLOADS = (
    Workload("call.linear", (), partial(linear, m=0, n=16, k=16)),
    Workload("call.attend_block", (), partial(attention, rows=0, keys=0, head_dim=16)),
    Workload("linear", ((1, 6, 24, 96, 1024), (16, 64, 512, 2048), (16, 64, 512, 2048)), linear),
    Workload("mlp", ((1, 6, 24, 96, 1024), (64, 512, 1024), (64, 512, 2048)), _mlp),
    Workload(
        "weights",
        ((1, 24, 96, 384),),
        partial(linear, n=1024, k=1024),
        partial(linear, n=1024, k=1024),
        pool_bytes=_MEMORY_BYTES,
    ),
    *(
        Workload(
            f"activation.{name}",
            ((96, 384), (64, 512)),
            partial(linear, k=16, activation=name),
            partial(linear, k=16),
        )
        for name in _ACTIVATIONS
    ),
    Workload(
        "attend_block",
        ((1, 6, 24, 96, 1536), (16, 64, 512, 1024), (16, 64, 128, 256)),
        attention,
        _no_attention,
        HEADS,
    ),
    *(_by_rows(f"norm.{kind}", partial(_norm, kind=kind)) for kind in ("rms", "layer")),
    _by_rows("rope", _rope),
    _by_rows("gather_rows", _gather),
    _by_rows("combine_rows", _combine),
    _by_rows("add", _add),
    _by_rows("sum_partials", _sum),
    _by_rows("copy", _copy),
    _by_rows("start_state", _start_state),
    _by_rows("finish", _finish),
    _by_rows("merge", _merge),
    Workload("select_experts", (_ROWS[:-1], (32, 256)), _select),
    Workload("sort_rows", (_ROWS, _EXPERTS), _sort),
)
"""Every kernel of a step."""
