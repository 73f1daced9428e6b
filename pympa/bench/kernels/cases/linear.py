"""Cases of linear layers and MLPs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pympa.bench.kernels.cases.workbench import Case, Workbench, relative_error, sample_rows, wide
from pympa.kernels import MlpWeights
from pympa.verify import reference


def linear_case(bench: Workbench, m: int, n: int, k: int) -> Case:
    """Prepare x `[m, k]` times a weight `[n, k]`."""
    x, out, rows = bench.normal(m, k), bench.empty(m, n), sample_rows(m)
    weight, packed = bench.weight(n, k)

    def peer(torch: Any) -> Callable[[], Any]:
        return partial(torch.nn.functional.linear, bench.tensor(x), bench.tensor(weight))

    return Case(
        kernel="linear",
        shape=f"{m}x{n}x{k}",
        tokens=m,
        flops=2 * m * n * k,
        bytes=x.nbytes + weight.nbytes + out.nbytes,
        run=lambda: bench.kernels.linear(x, packed, out),
        out=out,
        error=lambda: relative_error(out[rows], reference.linear(wide(x[rows]), wide(weight))),
        checked_rows=len(rows),
        peer=bench.peer(peer),
    )


def mlp_case(bench: Workbench, rows: int, width: int, hidden: int, gated: bool) -> Case:
    """Prepare an MLP of x `[rows, width]`: GELU (tanh), or gated by SiLU (Shazeer 2020)."""
    x, out = bench.normal(rows, width), bench.empty(rows, width)
    up, packed_up = bench.weight(hidden, width)
    down, packed_down = bench.weight(width, hidden)
    gate, packed_gate = bench.weight(hidden, width) if gated else (None, None)
    activation, sample = "silu" if gated else "gelu_tanh", sample_rows(rows)
    weights = MlpWeights(packed_up, packed_down, activation, gate=packed_gate)

    def error() -> float:
        wide_gate = None if gate is None else wide(gate)
        want = reference.mlp(wide(x[sample]), wide(up), wide(down), wide_gate, activation)
        return relative_error(out[sample], want)

    def peer(torch: Any) -> Callable[[], Any]:
        f = torch.nn.functional
        tx, tup, tdown = bench.tensor(x), bench.tensor(up), bench.tensor(down)
        if gate is None:
            return lambda: f.linear(f.gelu(f.linear(tx, tup), approximate="tanh"), tdown)
        tgate = bench.tensor(gate)
        return lambda: f.linear(f.silu(f.linear(tx, tgate)) * f.linear(tx, tup), tdown)

    matrices = 3 if gated else 2
    return Case(
        kernel="gated_mlp" if gated else "mlp",
        shape=f"{rows}x{width}x{hidden}",
        tokens=rows,
        flops=2 * matrices * rows * width * hidden,
        bytes=x.nbytes + matrices * up.nbytes + out.nbytes,
        run=lambda: bench.kernels.mlp(x, weights, out),
        out=out,
        error=error,
        checked_rows=len(sample),
        peer=bench.peer(peer),
    )
