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

from pympa.kernels import workloads as run
from pympa.runtime.arena import Array

_MEMORY_BYTES = 96 << 20  # more than a third-level cache
_ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
_EXPERTS = (4, 64)


class Extent(NamedTuple):
    """The rows and bytes of a kernel that works row by row.

    `row_bytes` is the number of bytes of each row that are read and written.
    """

    rows: int
    row_bytes: float


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
    workloads: tuple[run.Workload, ...] = ()


def nbytes(*values: Any) -> int:
    """Return the bytes of those values that are arrays."""
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))


def each_once(**arrays: Any) -> Extent:
    """Return the extent of a kernel that reads or writes each of its arrays once."""
    moved = {name: array for name, array in arrays.items() if name != "workspace"}
    last: Array = moved["out"] if "out" in moved else next(iter(moved.values()))
    rows = math.prod(last.shape[:-1])
    return Extent(rows, nbytes(*moved.values()) / max(rows, 1))


OPS = (
    Op("pack_weight", "weight [n, k], packed [bytes]"),
    Op(
        "linear",
        "x [rows, k], packed, out, residual, branch [rows, n], bias [n]",
        workloads=(
            run.Workload("call.linear", (), partial(run.linear, m=0, n=16, k=16)),
            run.Workload(
                "linear",
                ((1, 6, 24, 96, 1024), (16, 64, 512, 2048), (16, 64, 512, 2048)),
                run.linear,
            ),
            run.Workload(
                "weights",
                ((1, 24, 96, 384),),
                partial(run.linear, n=1024, k=1024),
                partial(run.linear, n=1024, k=1024),
                pool_bytes=_MEMORY_BYTES,
            ),
            *(
                run.Workload(
                    f"activation.{name}",
                    ((96, 384), (64, 512)),
                    partial(run.linear, k=16, activation=name),
                    partial(run.linear, k=16),
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
            run.Workload("mlp", ((1, 6, 24, 96, 1024), (64, 512, 1024), (64, 512, 2048)), run.mlp),
        ),
    ),
    Op(
        "attend_block",
        "q [rows, heads, head_dim], k, v [keys, kv_heads, dim], state of q",
        workloads=(
            run.Workload(
                "call.attend_block", (), partial(run.attention, rows=0, keys=0, head_dim=16)
            ),
            run.Workload(
                "attend_block",
                ((1, 6, 24, 96, 1536), (16, 64, 512, 1024), (16, 64, 128, 256)),
                run.attention,
                lambda rig, *_: run.attention(rig, 0, 0, 16),
                run.HEADS,
            ),
        ),
    ),
    Op("score_tile", "q [rows, heads, dim], k [keys, kv_heads, dim], scores [rows, heads, keys]"),
    Op("fold_tile", "scores [rows, heads, keys], v [keys, kv_heads, dim], state"),
    Op(
        "start_state",
        "row_max, row_sum [rows, heads], out [rows, heads, v_head_dim], sinks [heads]",
        lambda out, **_: each_once(out=out),
        run.by_rows("start_state", run.start_state),
    ),
    Op(
        "merge",
        "two states",
        lambda out, other_out, **_: each_once(out=out, again=out, other=other_out),
        run.by_rows("merge", run.merge),
    ),
    Op(
        "finish",
        "state, o [rows, heads, v_head_dim], lse [rows, heads]",
        lambda o, out, **_: each_once(o=o, out=out),
        run.by_rows("finish", run.finish),
    ),
    Op(
        "norm",
        "x, out [rows, d], weight, bias [d], squares [rows, 1]",
        lambda x, out, **_: each_once(x=x, out=out),
        tuple(
            run.Workload(f"norm.{kind}", run.GRID, partial(run.norm, kind=kind))
            for kind in ("rms", "layer")
        ),
    ),
    Op(
        "sum_squares",
        "x [rows, d], out [rows, 1]",
        each_once,
        run.by_rows("sum_squares", run.sum_squares),
    ),
    Op(
        "rope",
        "x [rows, heads, head_dim], cos, sin [n, half], index [rows]",
        lambda x, **_: each_once(x=x, again=x),
        run.by_rows("rope", run.rope),
    ),
    Op(
        "gather_rows",
        "source [n, d], index [rows], out [rows, d]",
        # Only the rows that are read count, not the whole source, such as a vocabulary.
        lambda out, **_: each_once(source=out, out=out),
        run.by_rows("gather_rows", run.gather_rows),
    ),
    Op(
        "select_experts",
        "logits [rows, n], experts, weights [rows, k], choice_bias [n]",
        lambda logits, **_: each_once(out=logits),
        (run.Workload("select_experts", (run.GRID[0][:-1], (32, 256)), run.select_experts),),
    ),
    Op(
        "sort_rows",
        "experts [rows, k], sources [rows k], inverse [rows, k], counts [n]",
        lambda experts, counts, **_: Extent(experts.size, float(len(counts))),
        (run.Workload("sort_rows", (run.GRID[0], _EXPERTS), run.sort_rows),),
    ),
    Op("count_experts", "experts [rows, k], segment_rows [s], counts [s, n]", each_once),
    Op("drop_overflow", "experts [rows, k], segment_rows, capacity [s], used [s, n]", each_once),
    Op(
        "combine_rows",
        "rows [m, d], inverse, weights [n, k], base, out [n, d], base_gate [n, 1]",
        lambda weights, base, out, **_: Extent(
            len(out), (weights.shape[1] + (1 if base is None else 2)) * out.shape[1] * out.itemsize
        ),
        run.by_rows("combine_rows", run.combine_rows),
    ),
    Op("add", "a, b, out [rows, d]", each_once, run.by_rows("add", run.add)),
    Op(
        "sum_partials",
        "parts [p, rows, d], bias [d], out [rows, d]",
        lambda parts, out, **_: each_once(parts=parts, out=out),
        run.by_rows("sum_partials", run.sum_partials),
    ),
    Op(
        "softcap",
        "x [rows, n]",
        lambda x, **_: each_once(x=x, again=x),
        run.by_rows("softcap", run.softcap),
    ),
    Op("copy", "source, out of one shape", each_once, run.by_rows("copy", run.copy)),
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
