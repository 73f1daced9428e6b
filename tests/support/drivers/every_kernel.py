"""Every kernel once, on odd sizes: what a memory or race checker runs, as they are slow.

compute-sanitizer --tool racecheck python tests/support/drivers/every_kernel.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from pympa.kernels import AttentionSpec, KvBlock, MlpWeights
from pympa.plan.layout import Layout, Range
from pympa.spec import Routing
from support.compare import ALL_DTYPES, HALVES, normal
from support.rig import Rig, device_rig


def run_every_kernel(rig: Rig) -> int:
    """Call every kernel on arrays whose sizes are multiples of nothing; return how many."""
    rng = np.random.default_rng(3)
    for dtype in ALL_DTYPES:
        with rig.scope():
            _rows(rig, rng, dtype)
    for dtype in HALVES:
        with rig.scope():
            _products(rig, rng, dtype)
        for head_dim in (64, 128, 256, 512, 37):
            for rows in (1, 67):
                with rig.scope():
                    _attention(rig, rng, dtype, rows, head_dim)
    with rig.scope():
        _routing(rig, rng)
    called = {name for name in rig.core.called if not name.endswith("_bytes")}
    return len(called - {"Execution", "supported_isas", "why_no_tiles"})


def _rows(rig: Rig, rng: np.random.Generator, dtype: np.dtype) -> None:
    rows, columns = 13, 77
    x = rig.put(normal(rng, (2, rows, columns), dtype))
    gain, bias = (rig.put(normal(rng, (columns,), dtype)) for _ in range(2))
    out = rig.empty((rows, columns), dtype)
    for kind in ("rms", "layer"):
        rig.kernels.norm(x[0], gain, bias, out, eps=1e-6, kind=kind)
    rig.kernels.norm(x[0][:, 1:], gain[1:], None, out[:, 1:], eps=1e-6, kind="rms", offset=1.0)
    squares = rig.empty((rows, 1), np.float32)
    rig.kernels.sum_squares(x[0], squares)
    part = {"squares": squares, "width": columns}
    rig.kernels.norm(x[0][:, 3:], gain[3:], None, out[:, 3:], eps=1e-6, kind="rms", **part)
    rig.kernels.add(x[0], x[1], out)
    rig.kernels.sum_partials(x, bias, out)
    rig.kernels.copy(x[0][:, 3:], out[:, 3:])
    index = rng.integers(-2, rows + 2, 29).astype(np.int32)
    rig.kernels.gather_rows(x[1], index, rig.empty((29, columns), dtype))
    heads = rig.put(normal(rng, (rows, 3, 50), dtype))
    cos, sin = (rig.put(normal(rng, (9, 21), np.float32)) for _ in range(2))
    for interleaved in (False, True):
        index = rng.integers(0, 9, rows).astype(np.int32)
        rig.kernels.rope(heads[:, :, 5:], cos, sin, index, interleaved=interleaved)
    inverse = rig.put(rng.integers(-1, rows, (19, 3)).astype(np.int32))
    weights = rig.put(rng.random((19, 3), np.float32))
    combined = rig.put(normal(rng, (19, columns), dtype))
    gate = rig.put(normal(rng, (19, 1), np.float32))
    for base_gate in (None, gate):
        rig.kernels.combine_rows(x[0], inverse, weights, combined, combined, base_gate=base_gate)


def _products(rig: Rig, rng: np.random.Generator, dtype: np.dtype) -> None:
    rows, width, hidden = 141, 83, 45
    x = rig.put(normal(rng, (rows, width), dtype))
    up, gate = (rig.weight(normal(rng, (hidden, width), dtype, 0.1)) for _ in range(2))
    down = rig.weight(normal(rng, (width, hidden), dtype, 0.1))
    bias = rig.put(normal(rng, (width,), dtype))
    out, branch = (rig.empty((rows, width), dtype) for _ in range(2))
    for activation in ("gelu", "gelu_tanh"):
        rig.kernels.mlp(x, MlpWeights(up, down, activation), out, bias=bias)
    gated = MlpWeights(up, down, "silu", gate=gate)
    rig.kernels.mlp(x, gated, out, bias=bias, residual=x, branch=branch)
    clamped = MlpWeights(up, down, "swiglu_clamped", gate=gate, limit=7.0, alpha=1.702)
    rig.kernels.mlp(x, clamped, out)
    logits = rig.empty((rows, hidden), np.float32)
    rig.kernels.linear(x, up, logits)
    rig.kernels.softcap(logits, 30.0)
    groups = rig.weight(normal(rng, (3, width, width), dtype, 0.1))
    rig.kernels.linear(x, groups, out, group_rows=np.array([5, 0, rows - 5]))


def _attention(
    rig: Rig, rng: np.random.Generator, dtype: np.dtype, rows: int, head_dim: int
) -> None:
    heads, kv_heads, keys = 3, 2, 203
    q = rig.put(normal(rng, (rows + 1, heads, head_dim), dtype))
    k, v = (rig.put(normal(rng, (keys + 9, kv_heads, head_dim), dtype)) for _ in range(2))
    q_layout = Layout((Range(1, 0, 1), Range(0, keys - rows, rows)))
    kv = KvBlock(k, v, Layout((Range(0, 0, keys), Range(1, 0, 9))))
    state, other = (rig.new_state(rows + 1, heads, head_dim) for _ in range(2))
    kv_head_of_q = np.array([0, 1, 1], np.int32)
    spec = AttentionSpec(kv_head_of_q, head_dim**-0.5, True, decode=rows == 1)
    rig.kernels.attend_block(q, q_layout, kv, state, spec)
    windowed = AttentionSpec(kv_head_of_q, head_dim**-0.5, False, 50, 9.0)
    rig.kernels.attend_block(q, q_layout, kv, other, windowed)
    rig.kernels.merge(state, other)
    scores = rig.empty((rows + 1, heads, 99), np.float32)
    rig.kernels.score_tile(q, k[:99], kv_head_of_q, scores)
    rig.kernels.fold_tile(scores, 600, 512, v[:99], state, spec)
    rig.kernels.start_state(other, rig.put(normal(rng, (heads,), dtype)))
    rig.kernels.attend_block(q, q_layout, kv, other, spec)
    rig.kernels.merge(state, other)
    o, _ = rig.finish(state, dtype)
    assert np.isfinite(o.astype(np.float32)).all()


def _routing(rig: Rig, rng: np.random.Generator) -> None:
    rows, count, choices = 301, 37, 3
    logits = rig.put(normal(rng, (rows, count), np.float32))
    experts, inverse = (rig.empty((rows, choices), np.int32) for _ in range(2))
    weights = rig.empty((rows, choices), np.float32)
    rig.kernels.select_experts(logits, experts, weights, renormalize=True)
    groups = Routing(
        score="sigmoid", choice_bias=True, groups=4, top_groups=2, group_score="top2", scale=2.5
    )
    bias = rig.put(normal(rng, (36,), np.float32))
    chosen = rig.empty((rows, choices), np.int32)
    rig.kernels.select_experts(
        logits[:, :36], chosen, weights, renormalize=True, routing=groups, choice_bias=bias
    )
    rig.kernels.sort_rows(experts, count, rig.empty((rows * choices,), np.int32), inverse)
    segments = np.array([100, 0, 201])
    used = rig.kernels.count_experts(experts, segments, count)
    rig.kernels.drop_overflow(experts, segments, used * 0, np.array([3, 1, 4]))


def main(arguments: list[str]) -> int:
    """Run on the GPU, or with `--emulated` on its emulation; 2 where there is none."""
    rig = device_rig("emulated" if "--emulated" in arguments else "gpu")
    if isinstance(rig, str):
        print(rig, file=sys.stderr)
        return 2
    print(f"key: {run_every_kernel(rig)} functions", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
