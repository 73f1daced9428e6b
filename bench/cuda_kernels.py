"""Check and time the CUDA kernels beside torch on one GPU: `python bench/cuda_kernels.py`.

First it measures the two ceilings, on random data: torch's bf16 product of 8192³, and a copy in
device memory, with bytes read and written. Then it prints a line for each case: median time, rate,
share of the ceiling that limits it, and torch's time over ours, above 1 where we are faster. Every
case is compared with float64 in sampled rows before it is timed. `cuda_rig.py` explains the timing;
torch's attention is its fastest backend that supports the shape, whose name is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pympa.errors import RefusedError
from pympa.kernels import MlpWeights, PackedWeight
from pympa.verify import reference

if TYPE_CHECKING:
    from cuda_rig import GpuRig

PARTS = ("prefill", "carried", "linear", "mlp", "decode", "rows")
_LINEAR = (
    (8192, 8192, 8192),
    (8192, 4096, 4096),
    (8192, 14336, 4096),
    (4096, 4096, 14336),
    (16, 14336, 4096),
    (1, 14336, 4096),
)  # rows, n, k
_MLP = (8192, 4096, 14336)  # rows, width, hidden
_FEW_ROWS = 64  # up to so many rows, reading the weight takes longer than multiplying
_ROWS, _COLUMNS, _HEAD_DIM = 32768, 4096, 128
_SAMPLED_ROWS = 16
_EPS = 1e-6


def _sampled(rows: int) -> list[int]:
    found: list[int] = np.unique(np.linspace(0, rows - 1, _SAMPLED_ROWS).astype(int)).tolist()
    return found


def linear(rig: GpuRig) -> None:
    """Time products beside cuBLAS as torch calls it."""
    for m, n, k in _LINEAR:
        with rig.arena.scope():
            _time_linear(rig, m, n, k)


def _time_linear(rig: GpuRig, m: int, n: int, k: int) -> None:
    import torch

    what, rows = f"linear {m} × {n} × {k}", _sampled(m)
    moved = 2 * (m * k + n * k + m * n)
    count = rig.sets(moved)
    x = [rig.random(m, k) for _ in range(count)]
    weights = [rig.random(n, k, scale=k**-0.5) for _ in range(count)]
    out = torch.full((m, n), float("nan"), device="cuda", dtype=rig.torch_dtype)
    inputs = [(rig.ours(a), rig.packed(w)) for a, w in zip(x, weights, strict=True)]
    ours_out = rig.ours(out)

    def run(index: int) -> None:
        a, weight = inputs[index % count]
        rig.kernels.linear(a, weight, ours_out)

    def peer(index: int) -> Any:
        return torch.nn.functional.linear(x[index % count], weights[index % count])

    run(0)
    want = reference.linear(rig.wide(x[0][rows]), rig.wide(weights[0]))
    rig.check(what, rig.wide(out[rows]), want)
    ours, theirs = rig.time(run, peer)
    cost = {"moved": moved} if m <= _FEW_ROWS else {"flops": 2 * m * n * k}
    headline = "linear" if (m, n, k) == _LINEAR[1] else None
    rig.report(what, ours, **cost, peer=theirs, peer_name="torch (cuBLAS)", headline=headline)


def mlp(rig: GpuRig) -> None:
    """Time MLPs, plain and gated, beside torch's calls one after the other."""
    for gated in (False, True):
        with rig.arena.scope():
            _time_mlp(rig, gated)


def _time_mlp(rig: GpuRig, gated: bool) -> None:
    import torch

    f, (rows, width, hidden) = torch.nn.functional, _MLP
    what = f"mlp {rows} × {width} × {hidden}{' gated' if gated else ''}"
    x, out = rig.random(rows, width), rig.random(rows, width)
    up, gate = (rig.random(hidden, width, scale=width**-0.5) for _ in range(2))
    down = rig.random(width, hidden, scale=hidden**-0.5)
    activation = "silu" if gated else "gelu_tanh"
    packed_gate: PackedWeight | None = rig.packed(gate) if gated else None
    weights = MlpWeights(rig.packed(up), rig.packed(down), activation, gate=packed_gate)
    ours_x, ours_out = rig.ours(x), rig.ours(out)

    def peer(_: int) -> Any:
        if gated:
            return f.linear(f.silu(f.linear(x, gate)) * f.linear(x, up), down)
        return f.linear(f.gelu(f.linear(x, up), approximate="tanh"), down)

    def run(_: int) -> None:
        rig.kernels.mlp(ours_x, weights, ours_out)

    run(0)
    wide_gate = rig.wide(gate) if gated else None
    sample = _sampled(rows)
    want = reference.mlp(rig.wide(x[sample]), rig.wide(up), rig.wide(down), wide_gate, activation)
    rig.check(what, rig.wide(out[sample]), want)
    ours, theirs = rig.time(run, peer)
    rig.report(what, ours, flops=2 * (3 if gated else 2) * rows * width * hidden, peer=theirs)


def rows(rig: GpuRig) -> None:
    """Time kernels that work row by row, beside torch where it has the same operation."""
    import torch

    f, k, size = torch.nn.functional, rig.kernels, 2 * _ROWS * _COLUMNS
    x = [rig.random(_ROWS, _COLUMNS) for _ in range(2)]
    weight, bias = rig.random(_COLUMNS), rig.random(_COLUMNS)
    out = torch.empty_like(x[0])
    a, to, gain, shift = [rig.ours(part) for part in x], *map(rig.ours, (out, weight, bias))
    index = torch.randperm(_ROWS, device="cuda")
    inverse = rig.ours(index.to(torch.int32))
    angle = torch.rand((_ROWS, _HEAD_DIM // 2), device="cuda") * 6.0
    tables = rig.ours(torch.cos(angle)), rig.ours(torch.sin(angle))
    rotated = rig.ours(rig.random(_ROWS, _COLUMNS // _HEAD_DIM, _HEAD_DIM))
    wider = rig.ours(rig.random(_ROWS, _COLUMNS + 64))
    wide_weight, wide_bias = weight.double(), bias.double()

    def time(
        name: str,
        moved: float,
        run: Callable[[int], Any],
        peer: Callable[[int], Any] | None = None,
        want: Callable[[Any], Any] | None = None,
    ) -> None:
        what = f"{name} {_ROWS} × {_COLUMNS}"
        if want is not None:
            sample = _sampled(_ROWS)
            out.fill_(float("nan"))
            run(0)
            rig.check(what, rig.wide(out[sample]), rig.wide(want(sample)))
        ours, *theirs = rig.time(run, *([peer] if peer else []))
        headline = name if name == "rms norm" else None
        rig.report(what, ours, moved=moved, peer=theirs[0] if theirs else None, headline=headline)

    time(
        "rms norm",
        2 * size,
        lambda i: k.norm(a[i % 2], gain, None, to, eps=_EPS, kind="rms"),
        lambda i: f.rms_norm(x[i % 2], (_COLUMNS,), weight, _EPS),
        lambda s: f.rms_norm(x[0][s].double(), (_COLUMNS,), wide_weight, _EPS),
    )
    time(
        "layer norm",
        2 * size,
        lambda i: k.norm(a[i % 2], gain, shift, to, eps=_EPS, kind="layer"),
        lambda i: f.layer_norm(x[i % 2], (_COLUMNS,), weight, bias, _EPS),
        lambda s: f.layer_norm(x[0][s].double(), (_COLUMNS,), wide_weight, wide_bias, _EPS),
    )
    time(
        "add",
        3 * size,
        lambda _: k.add(a[0], a[1], to),
        lambda _: torch.add(x[0], x[1]),
        lambda s: x[0][s].double() + x[1][s].double(),
    )
    time(
        "gather",
        2 * size,
        lambda i: k.gather_rows(a[i % 2], inverse, to),
        lambda i: x[i % 2].index_select(0, index),
        lambda s: x[0][index[s]],
    )
    time("copy to strided rows", 2 * size, lambda i: k.copy(a[i % 2], wider[:, :_COLUMNS]))
    time("rope", 2 * size + 4 * angle.numel() * 2, partial(_rotate, k, rotated, *tables, inverse))


def _rotate(kernels: Any, x: Any, cos: Any, sin: Any, index: Any, _: int) -> None:
    kernels.rope(x, cos, sin, index)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the selected parts; return 1 if a part failed, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(description="Check and time the CUDA kernels beside torch.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts; all")
    parser.add_argument("--rounds", type=int, default=7, help="timed batches of a case (7)")
    parser.add_argument("--output", metavar="FILE.jsonl", default="/dev/null", help="JSON lines")
    options = parser.parse_args(arguments)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        from cuda_attention import carried, decode, prefill
        from cuda_rig import GpuRig

        run = {
            "prefill": prefill,
            "carried": carried,
            "linear": linear,
            "mlp": mlp,
            "decode": decode,
            "rows": rows,
        }
        with Path(options.output).open("a") as output:
            rig = GpuRig(output, options.rounds)
            rig.measure_ceilings()
            for name in options.only:
                rig.attempt(name, partial(run[name], rig))
    except (ImportError, OSError, RefusedError) as error:
        print(f"cuda_kernels: {error}", file=sys.stderr)
        return 2
    return 1 if rig.failed else 0


if __name__ == "__main__":
    sys.exit(main())
