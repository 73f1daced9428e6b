"""Every kernel once, on odd sizes: what a memory or race checker runs, as they are slow.

compute-sanitizer --tool racecheck python tests/gpu/every_kernel.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from on_device import ALL_DTYPES, HALVES, Workbench, normal, open_workbench
from pympa.kernels import AttentionSpec, KvBlock, MlpWeights
from pympa.layout import Layout, Range


def run_every_kernel(bench: Workbench) -> int:
    """Call every kernel on arrays whose sizes are multiples of nothing; return how many."""
    rng = np.random.default_rng(3)
    for dtype in ALL_DTYPES:
        with bench.scope():
            _rows(bench, rng, dtype)
    for dtype in HALVES:
        with bench.scope():
            _products(bench, rng, dtype)
        for head_dim in (64, 128, 256, 512, 37):
            for rows in (1, 67):
                with bench.scope():
                    _attention(bench, rng, dtype, rows, head_dim)
    with bench.scope():
        _routing(bench, rng)
    called = {name for name in bench.core.called if not name.endswith("_bytes")}
    return len(called - {"Execution", "supported_isas"})


def _rows(bench: Workbench, rng: np.random.Generator, dtype: np.dtype) -> None:
    rows, columns = 13, 77
    x = bench.put(normal(rng, (2, rows, columns), dtype))
    gain, bias = (bench.put(normal(rng, (columns,), dtype)) for _ in range(2))
    out = bench.empty((rows, columns), dtype)
    for kind in ("rms", "layer"):
        bench.kernels.norm(x[0], gain, bias, out, eps=1e-6, kind=kind)
    bench.kernels.norm(x[0][:, 1:], gain[1:], None, out[:, 1:], eps=1e-6, kind="rms")
    bench.kernels.add(x[0], x[1], out)
    bench.kernels.sum_partials(x, bias, out)
    bench.kernels.copy(x[0][:, 3:], out[:, 3:])
    index = rng.integers(-2, rows + 2, 29).astype(np.int32)
    bench.kernels.gather_rows(x[1], index, bench.empty((29, columns), dtype))
    heads = bench.put(normal(rng, (rows, 3, 50), dtype))
    cos, sin = (bench.put(normal(rng, (9, 21), np.float32)) for _ in range(2))
    bench.kernels.rope(heads, cos, sin, rng.integers(0, 9, rows).astype(np.int32))
    places = bench.put(rng.integers(-1, rows, (19, 3)).astype(np.int32))
    weights = bench.put(rng.random((19, 3), np.float32))
    combined = bench.put(normal(rng, (19, columns), dtype))
    bench.kernels.combine_rows(x[0], places, weights, combined, combined)


def _products(bench: Workbench, rng: np.random.Generator, dtype: np.dtype) -> None:
    rows, width, hidden = 141, 83, 45
    x = bench.put(normal(rng, (rows, width), dtype))
    up, gate = (bench.weight(normal(rng, (hidden, width), dtype, 0.1)) for _ in range(2))
    down = bench.weight(normal(rng, (width, hidden), dtype, 0.1))
    bias = bench.put(normal(rng, (width,), dtype))
    out, branch = (bench.empty((rows, width), dtype) for _ in range(2))
    for activation in ("gelu", "gelu_tanh"):
        bench.kernels.mlp(x, MlpWeights(up, down, activation), out, bias=bias)
    gated = MlpWeights(up, down, "silu", gate=gate)
    bench.kernels.mlp(x, gated, out, bias=bias, residual=x, branch=branch)
    bench.kernels.linear(x, up, bench.empty((rows, hidden), np.float32))
    groups = bench.weight(normal(rng, (3, width, width), dtype, 0.1))
    bench.kernels.linear(x, groups, out, group_rows=np.array([5, 0, rows - 5]))


def _attention(
    bench: Workbench, rng: np.random.Generator, dtype: np.dtype, rows: int, head_dim: int
) -> None:
    heads, kv_heads, keys = 3, 2, 203
    q = bench.put(normal(rng, (rows + 1, heads, head_dim), dtype))
    k, v = (bench.put(normal(rng, (keys + 9, kv_heads, head_dim), dtype)) for _ in range(2))
    q_layout = Layout((Range(1, 0, 1), Range(0, keys - rows, rows)))
    kv = KvBlock(k, v, Layout((Range(0, 0, keys), Range(1, 0, 9))))
    state, other = (bench.state(rows + 1, heads, head_dim) for _ in range(2))
    kv_head_of_q = np.array([0, 1, 1], np.int32)
    spec = AttentionSpec(kv_head_of_q, head_dim**-0.5, True, decode=rows == 1)
    bench.kernels.attend_block(q, q_layout, kv, state, spec)
    windowed = AttentionSpec(kv_head_of_q, head_dim**-0.5, False, 50, 9.0)
    bench.kernels.attend_block(q, q_layout, kv, other, windowed)
    bench.kernels.merge(state, other)
    scores = bench.empty((rows + 1, heads, 99), np.float32)
    bench.kernels.score_tile(q, k[:99], kv_head_of_q, scores)
    bench.kernels.fold_tile(scores, 600, 512, v[:99], state, spec)
    o, _ = bench.finished(state, dtype)
    assert np.isfinite(o.astype(np.float32)).all()


def _routing(bench: Workbench, rng: np.random.Generator) -> None:
    rows, count, choices = 301, 37, 3
    logits = bench.put(normal(rng, (rows, count), np.float32))
    experts, places = (bench.empty((rows, choices), np.int32) for _ in range(2))
    weights = bench.empty((rows, choices), np.float32)
    bench.kernels.select_experts(logits, experts, weights, renormalize=True)
    bench.kernels.sort_rows(experts, count, bench.empty((rows * choices,), np.int32), places)
    segments = np.array([100, 0, 201])
    used = bench.kernels.count_experts(experts, segments, count)
    bench.kernels.drop_overflow(experts, segments, used * 0, np.array([3, 1, 4]))


def main(arguments: list[str]) -> int:
    """Run on the GPU, or with `--emulated` on its emulation; 2 where there is none."""
    bench = open_workbench("emulated" if "--emulated" in arguments else "gpu")
    if isinstance(bench, str):
        print(bench, file=sys.stderr)
        return 2
    print(f"key: {run_every_kernel(bench)} functions", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
