"""Cases of a mixture of experts, from the gate to the combined outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pympa.bench.kernels.cases.workbench import Case, Workbench, relative_error, sample_rows, wide
from pympa.kernels import MlpWeights
from pympa.runtime.arena import Array
from pympa.verify import reference
from pympa.verify.reference import F64

_SKEW = 3.0  # gate bias of the first expert minus the last one's; logits have a deviation of 1


def moe_case(
    bench: Workbench, rows: int, width: int, hidden: int, experts: int, top_k: int, skewed: bool
) -> Case:
    """Prepare x `[rows, width]` through the MLPs (GELU, tanh) of `top_k` experts of each row.

    The gate's softmax is renormalised over the chosen experts. A bias of the gate makes the load
    `skewed`; without it each expert gets about as many rows.
    """
    x, out, sample = bench.normal(rows, width), bench.empty(rows, width), sample_rows(rows)
    gate, packed_gate = bench.weight(experts, width)
    bias = bench.empty(experts)
    bias[...] = np.linspace(_SKEW if skewed else 0.0, 0.0, experts)
    up, packed_up = bench.weights(experts, hidden, width)
    down, packed_down = bench.weights(experts, width, hidden)
    mlps = MlpWeights(packed_up, packed_down, "gelu_tanh")
    logits = bench.arena.empty((rows, experts), np.float32)
    chosen, inverse = (bench.arena.empty((rows, top_k), np.int32) for _ in range(2))
    shares = bench.arena.empty((rows, top_k), np.float32)
    sources = bench.arena.empty((rows * top_k,), np.int32)
    sent, returned = (bench.empty(rows * top_k, width) for _ in range(2))

    def run() -> None:
        kernels = bench.kernels
        kernels.linear(x, packed_gate, logits, bias=bias)
        kernels.select_experts(logits, chosen, shares, renormalize=True)
        counts = kernels.sort_rows(chosen, experts, sources, inverse)
        kernels.gather_rows(x, sources, sent)
        kernels.mlp(sent, mlps, returned, group_rows=counts)
        kernels.combine_rows(returned, inverse, shares, None, out)

    def peer(torch: Any) -> Callable[[], Any]:
        arrays = (x, gate.astype(np.float32), bias.astype(np.float32), up, down)
        return _torch_loop(torch, top_k, *map(bench.tensor, arrays))

    def error() -> float:
        return relative_error(out[sample], _expected(wide(x[sample]), gate, bias, up, down, top_k))

    return Case(
        kernel="skewed_moe" if skewed else "even_moe",
        shape=f"{rows}x{width}x{hidden}x{experts}x{top_k}",
        tokens=rows,
        flops=4 * rows * top_k * width * hidden + 2 * rows * width * experts,
        bytes=sum(array.nbytes for array in (x, gate, bias, up, down, out)),
        run=run,
        out=out,
        error=error,
        checked_rows=len(sample),
        peer=bench.peer(peer),
    )


def _expected(x: F64, gate: Array, bias: Array, up: Array, down: Array, top_k: int) -> F64:
    logits = reference.linear(x, wide(gate), wide(bias))
    chosen = reference.largest(logits, top_k)
    shares = np.exp(np.take_along_axis(logits, chosen, axis=1))
    shares /= shares.sum(axis=1, keepdims=True)
    want = np.zeros_like(x)
    for expert in np.unique(chosen):
        row, k = np.nonzero(chosen == expert)
        y = reference.mlp(x[row], wide(up[expert]), wide(down[expert]), None, "gelu_tanh")
        want[row] += shares[row, k][:, None] * y
    return want


def _torch_loop(
    torch: Any, top_k: int, x: Any, gate: Any, bias: Any, up: Any, down: Any
) -> Callable[[], Any]:
    """Return the usual eager loop over experts, since torch has no single operation for it.

    The gate is float32 like ours; otherwise rounding would send rows to other experts.
    """
    f = torch.nn.functional

    def layer() -> Any:
        logits = f.linear(x.float(), gate, bias)
        shares, chosen = torch.softmax(logits, dim=-1).topk(top_k, dim=-1)
        shares = (shares / shares.sum(dim=-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for expert in range(len(up)):
            row, k = torch.where(chosen == expert)
            inside = f.gelu(f.linear(x.index_select(0, row), up[expert]), approximate="tanh")
            out.index_add_(0, row, f.linear(inside, down[expert]) * shares[row, k, None])
        return out

    return layer
