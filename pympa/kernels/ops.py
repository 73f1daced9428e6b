"""The table of ops: the name, arrays, extent and calibration workloads of each kernel.

A new op is a row here, a method in the kernels' protocol and C++ files. Simulations use the names
and the extents of this table, calibration uses the workloads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pympa.kernels import AttentionSpec, KvBlock, MlpWeights
from pympa.kernels.rig import Rig
from pympa.plan.layout import Layout, Range
from pympa.runtime.arena import Array

POOL_BYTES = 8 << 20  # arrays that calls cycle through: more than a second-level cache
_MEMORY_BYTES = 96 << 20  # more than a third-level cache
_GRID = (1, 64, 1024, 8192), (64, 512, 4096)  # rows, and bytes of a row
_ROPE_HEADS = 8  # heads that share a row of RoPE's tables
_ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
_EXPERTS = (4, 64)
HEADS = 4

Run = Callable[[], object]


class Extent(NamedTuple):
    """The rows and bytes of a kernel that works row by row.

    `row_bytes` is the number of bytes of each row that are read and written.
    """

    rows: int
    row_bytes: float


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


@dataclass(frozen=True)
class Op:
    """One kernel.

    Attributes:
        name: the name in `pympa._core`.
        arrays: the shapes of its arrays.
        extent: a function from the arrays to rows and bytes; None where the seconds depend on more,
            as in products and attention.
        workloads: the workloads of calibration; none where a copy of the same bytes is near enough.
    """

    name: str
    arrays: str
    extent: Callable[..., Extent] | None = None
    workloads: tuple[Workload, ...] = ()


def nbytes(*values: Any) -> int:
    """Return the bytes of those values that are arrays."""
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))


def each_once(**arrays: Any) -> Extent:
    """Return the extent of a kernel that reads or writes each of its arrays once."""
    moved = {name: array for name, array in arrays.items() if name != "workspace"}
    last: Array = moved["out"] if "out" in moved else next(iter(moved.values()))
    rows = math.prod(last.shape[:-1])
    return Extent(rows, nbytes(*moved.values()) / max(rows, 1))


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


def _mlp(rig: Rig, rows: int, width: int, hidden: int) -> Run:
    x, out = rig.filled(rows, width), rig.filled(rows, width)
    up = rig.filled_weight(hidden, width)
    down = rig.filled_weight(width, hidden)
    weights = MlpWeights(up, down, "none")
    return lambda: rig.kernels.mlp(x, weights, out)


def _sum_squares(rig: Rig, rows: int, row_bytes: int) -> Run:
    (x,) = _rows(rig, rows, row_bytes, 1)
    out = rig.arena.empty((rows, 1), np.float32)
    return lambda: rig.kernels.sum_squares(x, out)


def _softcap(rig: Rig, rows: int, row_bytes: int) -> Run:
    x = rig.arena.empty((rows, row_bytes // 8), np.float32)
    rig.fill(x)
    return lambda: rig.kernels.softcap(x, 30.0)


def _norm(rig: Rig, rows: int, row_bytes: int, kind: str) -> Run:
    x, out = _rows(rig, rows, row_bytes, 2)
    gain = rig.filled(x.shape[1])
    bias = gain if kind == "layer" else None
    return lambda: rig.kernels.norm(x, gain, bias, out, eps=1e-6, kind=kind)


def _rope(rig: Rig, rows: int, row_bytes: int) -> Run:
    (x,) = _rows(rig, rows, row_bytes, 2, arrays=1)
    heads, half = min(_ROPE_HEADS, rows), x.shape[1] // 2
    whole = x[:, : 2 * half].reshape(rows // heads, heads, 2 * half)
    cos, sin = (rig.arena.empty((len(whole), half), np.float32) for _ in range(2))
    cos.fill(1.0)
    sin.fill(0.0)
    index = np.arange(len(whole), dtype=np.int32)
    return lambda: rig.kernels.rope(whole, cos, sin, index)


def _gather(rig: Rig, rows: int, row_bytes: int) -> Run:
    source, out = _rows(rig, rows, row_bytes, 2)
    index = np.random.default_rng(0).permutation(rows).astype(np.int32)
    return lambda: rig.kernels.gather_rows(source, index, out)


def _combine(rig: Rig, rows: int, row_bytes: int) -> Run:
    """Return a call that combines two choices of each row, without a base."""
    (out,) = _rows(rig, rows, row_bytes, 3, arrays=1)
    chosen = rig.filled(2 * rows, out.shape[1])
    inverse = np.random.default_rng(0).permutation(2 * rows).astype(np.int32).reshape(rows, 2)
    weights = np.full((rows, 2), 0.5, np.float32)
    return lambda: rig.kernels.combine_rows(chosen, inverse, weights, None, out)


def _add(rig: Rig, rows: int, row_bytes: int) -> Run:
    a, b, out = _rows(rig, rows, row_bytes, 3)
    return lambda: rig.kernels.add(a, b, out)


def _sum(rig: Rig, rows: int, row_bytes: int) -> Run:
    (out,) = _rows(rig, rows, row_bytes, 3, arrays=1)
    parts = rig.filled(2, *out.shape)
    return lambda: rig.kernels.sum_partials(parts, None, out)


def _copy(rig: Rig, rows: int, row_bytes: int) -> Run:
    """Return a copy of slices of rows, as when slices are cut from whole heads."""
    width = max(1, row_bytes // 2 // rig.dtype.itemsize)
    source, out = rig.filled(rows, 2, width)[:, 0], rig.filled(rows, width)
    return lambda: rig.kernels.copy(source, out)


def _start_state(rig: Rig, rows: int, row_bytes: int) -> Run:
    state = rig.state(rows, row_bytes // 4)
    return lambda: rig.kernels.start_state(state)


def _finish(rig: Rig, rows: int, row_bytes: int) -> Run:
    state = rig.state(rows, row_bytes // (4 + rig.dtype.itemsize))
    o, lse = rig.filled(*state.out.shape), rig.arena.empty((rows, 1), np.float32)
    return lambda: rig.kernels.finish(state, o, lse)


def _merge(rig: Rig, rows: int, row_bytes: int) -> Run:
    state, other = (rig.state(rows, row_bytes // 12) for _ in range(2))
    return lambda: rig.kernels.merge(state, other)


def _select(rig: Rig, rows: int, row_bytes: int) -> Run:
    logits = np.random.default_rng(0).standard_normal((rows, row_bytes // 4), np.float32)
    experts, weights = np.empty((rows, 2), np.int32), np.empty((rows, 2), np.float32)
    select = rig.kernels.select_experts
    return lambda: select(logits, experts, weights, renormalize=True)


def _sort(rig: Rig, pairs: int, count: int) -> Run:
    experts = np.random.default_rng(0).integers(0, count, (pairs, 1)).astype(np.int32)
    sources, inverse = np.empty(pairs, np.int32), np.empty((pairs, 1), np.int32)
    return lambda: rig.kernels.sort_rows(experts, count, sources, inverse)


def _rows(rig: Rig, rows: int, row_bytes: int, parts: int, arrays: int = 0) -> list[Array]:
    """Return arrays `[rows, width]` with `row_bytes` for each row, divided by `parts`."""
    width = max(2, row_bytes // parts // rig.dtype.itemsize)
    return [rig.filled(rows, width) for _ in range(arrays or parts)]


def _by_rows(curve: str, make: Callable[..., Run]) -> tuple[Workload, ...]:
    return (Workload(curve, _GRID, make),)


OPS = (
    Op("pack_weight", "weight [n, k], packed [bytes]"),
    Op(
        "linear",
        "x [rows, k], packed, out, residual, branch [rows, n], bias [n]",
        workloads=(
            Workload("call.linear", (), partial(linear, m=0, n=16, k=16)),
            Workload(
                "linear", ((1, 6, 24, 96, 1024), (16, 64, 512, 2048), (16, 64, 512, 2048)), linear
            ),
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
        ),
    ),
    Op("gated_linear", "x [rows, k], packed_gate, packed_up, out [rows, n], biases [n]"),
    Op(
        "mlp",
        "x [rows, d], packed_gate, packed_up, packed_down, out, residual, branch [rows, d_out]",
        workloads=(
            Workload("mlp", ((1, 6, 24, 96, 1024), (64, 512, 1024), (64, 512, 2048)), _mlp),
        ),
    ),
    Op(
        "attend_block",
        "q [rows, heads, head_dim], k, v [keys, kv_heads, dim], state of q",
        workloads=(
            Workload("call.attend_block", (), partial(attention, rows=0, keys=0, head_dim=16)),
            Workload(
                "attend_block",
                ((1, 6, 24, 96, 1536), (16, 64, 512, 1024), (16, 64, 128, 256)),
                attention,
                lambda rig, *_: attention(rig, 0, 0, 16),
                HEADS,
            ),
        ),
    ),
    Op("score_tile", "q [rows, heads, dim], k [keys, kv_heads, dim], scores [rows, heads, keys]"),
    Op("fold_tile", "scores [rows, heads, keys], v [keys, kv_heads, dim], state"),
    Op(
        "start_state",
        "row_max, row_sum [rows, heads], out [rows, heads, v_head_dim], sinks [heads]",
        lambda out, **_: each_once(out=out),
        _by_rows("start_state", _start_state),
    ),
    Op(
        "merge",
        "two states",
        lambda out, other_out, **_: each_once(out=out, again=out, other=other_out),
        _by_rows("merge", _merge),
    ),
    Op(
        "finish",
        "state, o [rows, heads, v_head_dim], lse [rows, heads]",
        lambda o, out, **_: each_once(o=o, out=out),
        _by_rows("finish", _finish),
    ),
    Op(
        "norm",
        "x, out [rows, d], weight, bias [d], squares [rows, 1]",
        lambda x, out, **_: each_once(x=x, out=out),
        tuple(
            Workload(f"norm.{kind}", _GRID, partial(_norm, kind=kind)) for kind in ("rms", "layer")
        ),
    ),
    Op(
        "sum_squares",
        "x [rows, d], out [rows, 1]",
        each_once,
        _by_rows("sum_squares", _sum_squares),
    ),
    Op(
        "rope",
        "x [rows, heads, head_dim], cos, sin [n, half], index [rows]",
        lambda x, **_: each_once(x=x, again=x),
        _by_rows("rope", _rope),
    ),
    Op(
        "gather_rows",
        "source [n, d], index [rows], out [rows, d]",
        # Only the rows that are read count, not the whole source, such as a vocabulary.
        lambda out, **_: each_once(source=out, out=out),
        _by_rows("gather_rows", _gather),
    ),
    Op(
        "select_experts",
        "logits [rows, n], experts, weights [rows, k], choice_bias [n]",
        lambda logits, **_: each_once(out=logits),
        (Workload("select_experts", (_GRID[0][:-1], (32, 256)), _select),),
    ),
    Op(
        "sort_rows",
        "experts [rows, k], sources [rows k], inverse [rows, k], counts [n]",
        lambda experts, counts, **_: Extent(experts.size, float(len(counts))),
        (Workload("sort_rows", (_GRID[0], _EXPERTS), _sort),),
    ),
    Op("count_experts", "experts [rows, k], segment_rows [s], counts [s, n]", each_once),
    Op("drop_overflow", "experts [rows, k], segment_rows, capacity [s], used [s, n]", each_once),
    Op(
        "combine_rows",
        "rows [m, d], inverse, weights [n, k], base, out [n, d], base_gate [n, 1]",
        lambda weights, base, out, **_: Extent(
            len(out), (weights.shape[1] + (1 if base is None else 2)) * out.shape[1] * out.itemsize
        ),
        _by_rows("combine_rows", _combine),
    ),
    Op("add", "a, b, out [rows, d]", each_once, _by_rows("add", _add)),
    Op(
        "sum_partials",
        "parts [p, rows, d], bias [d], out [rows, d]",
        lambda parts, out, **_: each_once(parts=parts, out=out),
        _by_rows("sum_partials", _sum),
    ),
    Op(
        "softcap",
        "x [rows, n]",
        lambda x, **_: each_once(x=x, again=x),
        _by_rows("softcap", _softcap),
    ),
    Op("copy", "source, out of one shape", each_once, _by_rows("copy", _copy)),
)
"""All kernels."""

_BY_NAME = {op.name: op for op in OPS}


def extent(name: str, arrays: dict[str, Any]) -> Extent:
    """Return the extent of a call.

    Args:
        name: the name of the op.
        arrays: the arguments of the call by name; arguments that are not arrays do not count.
    """
    op = _BY_NAME[name]
    return (op.extent or each_once)(**arrays)
