"""Cases that work on each row separately: norms and RoPE."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pympa.bench.kernels.cases.workbench import Case, Workbench, relative_error, sample_rows, wide
from pympa.spec import Rope
from pympa.verify import reference

_EPS = 1e-6
_THETA = 10000.0


def norm_case(bench: Workbench, rows: int, columns: int, kind: str) -> Case:
    """Prepare RMSNorm ("rms", with a gain) or LayerNorm ("layer", with gain and bias)."""
    x, out, sample = bench.normal(rows, columns), bench.empty(rows, columns), sample_rows(rows)
    weight, bias = bench.normal(columns), bench.normal(columns) if kind == "layer" else None

    def error() -> float:
        wide_bias = None if bias is None else wide(bias)
        want = reference.norm(wide(x[sample]), wide(weight), wide_bias, _EPS, kind)
        return relative_error(out[sample], want)

    def peer(torch: Any) -> Callable[[], Any]:
        f, tensors = torch.nn.functional, [bench.tensor(x), (columns,), bench.tensor(weight)]
        if bias is None:
            return partial(f.rms_norm, *tensors, eps=_EPS)
        return partial(f.layer_norm, *tensors, bench.tensor(bias), eps=_EPS)

    return Case(
        kernel=f"{kind}_norm",
        shape=f"{rows}x{columns}",
        tokens=rows,
        flops=(4 if bias is None else 7) * rows * columns,
        bytes=x.nbytes + out.nbytes + (1 if bias is None else 2) * weight.nbytes,
        run=lambda: bench.kernels.norm(x, weight, bias, out, eps=_EPS, kind=kind),
        out=out,
        error=error,
        checked_rows=len(sample),
        peer=bench.peer(peer),
    )


def rope_case(bench: Workbench, rows: int, heads: int, head_dim: int) -> Case:
    """Prepare RoPE of all dims of x `[rows, heads, head_dim]`, in place, at positions 0, 1, ..."""
    x, sample = bench.normal(rows, heads, head_dim), sample_rows(rows)
    before = wide(x[sample])
    frequency = _THETA ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = np.arange(rows)[:, None] * frequency
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    index = np.arange(rows, dtype=np.int32)

    def error() -> float:
        return relative_error(x[sample], reference.rope(before, sample, Rope(theta=_THETA)))

    def peer(torch: Any) -> Callable[[], Any]:
        # The usual eager formula, since torch has no single operation for it.
        tx, tables = (
            bench.tensor(x),
            (np.tile(t[:, None], 2).astype(bench.dtype) for t in (cos, sin)),
        )
        tcos, tsin = (bench.tensor(table) for table in tables)
        half = head_dim // 2

        def rotate() -> Any:
            return tx * tcos + torch.cat((-tx[..., half:], tx[..., :half]), dim=-1) * tsin

        return rotate

    return Case(
        kernel="rope",
        shape=f"{rows}x{heads}",
        tokens=rows,
        head_dim=head_dim,
        flops=3 * x.size,
        bytes=2 * x.nbytes + cos.nbytes + sin.nbytes,
        run=lambda: bench.kernels.rope(x, cos, sin, index),
        out=x,
        error=error,
        checked_rows=len(sample),
        peer=bench.peer(peer),
    )
