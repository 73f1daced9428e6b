"""Time the CPU kernels of this machine, each one checked first.

Every case is compared with float64 on sampled rows before it is timed. Flops are the useful ones:
2 m n k for a linear layer; for attention 2 area (head_dim + v_head_dim), where the area is
tokens^2, or tokens (tokens + 1) / 2 under a causal mask. "Peak" is the fraction of what the same
cores reach on register-only multiply-adds in the same run. With a peer the runs alternate, so
that both meet the same noise; the ratio is peer seconds / our seconds (medians).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pympa import _core, reference
from pympa.spec import DTYPES
from pympa.verify import TOLERANCE

Array: TypeAlias = NDArray[Any]

_CHECKED_ROWS = 16
_SHAPES = ((2048, 2048, 2048), (512, 4096, 1024), (1, 4096, 4096))  # m, n, k
_HEAD_DIMS = (64, 128, 512)
_TOKENS = (2048, 4096)
_PIPE_COLUMNS = 125
_LINE_BYTES = 64


@dataclass(frozen=True)
class Case:
    """One kernel on one shape, ready to run.

    Attributes:
        kernel: "linear" or "attention".
        dtype: element type.
        head_dim: 0 for linear.
        causal: whether later keys are masked; False for linear.
        tokens: rows.
        shape: the whole shape in words.
        flops: useful floating-point operations of one run.
        run: runs the kernel once.
        error: relative error of the sampled rows after a run.
        peer: runs torch's counterpart once, or None.
    """

    kernel: str
    dtype: str
    head_dim: int
    causal: bool
    tokens: int
    shape: str
    flops: int
    run: Callable[[], None]
    error: Callable[[], float]
    peer: Callable[[], None] | None


@dataclass(frozen=True)
class Seconds:
    """Median, minimum and maximum of some runs, in seconds."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Result:
    """One measured case, as written to the output file."""

    kernel: str
    dtype: str
    head_dim: int
    causal: bool
    tokens: int
    shape: str
    isa: str
    threads: int
    iterations: int
    flops: int
    step_seconds: Seconds
    gflops: float
    peak_fraction: float
    peer_seconds: Seconds | None
    peer_ratio: float | None
    error: float
    tolerance: float
    checked_rows: int


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    return rng.standard_normal(shape, np.float32).astype(DTYPES[dtype])


def _aligned_bytes(size: int) -> NDArray[np.uint8]:
    """Return `size` bytes that start on a cache line, as an arena would give them."""
    buffer = np.empty(size + _LINE_BYTES, np.uint8)
    start = -buffer.ctypes.data % _LINE_BYTES
    return buffer[start : start + size]


def _relative_error(got: Array, want: Array) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


def _torch(threads: int) -> Any:
    try:
        import torch
    except ImportError as error:
        raise SystemExit("--against torch: torch is missing; pip install 'pympa[peers]'") from error
    torch.set_num_threads(threads)
    return torch


def _tensor(torch: Any, array: Array) -> Any:
    return torch.from_numpy(array.astype(np.float32)).to(getattr(torch, array.dtype.name))


def _discard(function: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], None]:
    def run() -> None:
        function(*arguments, **options)

    return run


def linear_case(
    shape: tuple[int, int, int], dtype: str, threads: int, isa: str, torch: Any
) -> Case:
    """Prepare x `[m, k]` times a packed weight `[n, k]`."""
    m, n, k = shape
    rng = np.random.default_rng(0)
    x, weight = _normal(rng, (m, k), dtype), _normal(rng, (n, k), dtype)
    packed = _aligned_bytes(_core.packed_weight_bytes(n, k, dtype, isa))
    _core.pack_weight(weight, packed, isa)
    out = np.empty((m, n), x.dtype)
    workspace_bytes = _core.linear_workspace_bytes(m, n, k, dtype, False, threads, isa)
    workspace = np.empty(workspace_bytes, np.uint8)
    rows = np.unique(np.linspace(0, m - 1, _CHECKED_ROWS).astype(int))

    def run() -> None:
        _core.linear(x, packed, out, None, "none", None, None, workspace, threads, isa)

    def error() -> float:
        return _relative_error(out[rows], x[rows].astype(np.float64) @ weight.T.astype(np.float64))

    peer = None
    if torch is not None:
        functional = torch.nn.functional
        peer = _discard(functional.linear, _tensor(torch, x), _tensor(torch, weight))
    return Case("linear", dtype, 0, False, m, f"{m}x{n}x{k}", 2 * m * n * k, run, error, peer)


def _attention_error(q: Array, k: Array, v: Array, o: Array, causal: bool) -> float:
    tokens, _, head_dim = q.shape
    rows = np.unique(np.linspace(0, tokens - 1, _CHECKED_ROWS).astype(int))
    want, _ = reference.attention(
        q[rows].astype(np.float64),
        k.astype(np.float64),
        v.astype(np.float64),
        rows,
        np.arange(tokens),
        kv_head_of_q=[0],
        scale=head_dim**-0.5,
        causal=causal,
    )
    return _relative_error(o[rows], want)


def attention_case(
    tokens: int, head_dim: int, causal: bool, dtype: str, threads: int, isa: str, torch: Any
) -> Case:
    """Prepare attention of one sequence, one head, with its state's reset and `finish`."""
    rng = np.random.default_rng(0)
    q, k, v = (_normal(rng, (tokens, 1, head_dim), dtype) for _ in range(3))
    row_max = np.empty((tokens, 1), np.float32)
    row_sum, lse = np.empty_like(row_max), np.empty_like(row_max)
    out = np.empty((tokens, 1, head_dim), np.float32)
    o = np.empty_like(q)
    ranges, kv_head_of_q = np.array([[0, 0, tokens]], np.int64), np.zeros(1, np.int32)
    workspace_bytes = _core.attention_workspace_bytes(head_dim, head_dim, dtype, threads, isa)
    workspace = np.empty(workspace_bytes, np.uint8)
    scale = head_dim**-0.5

    def run() -> None:
        row_max.fill(-np.inf)
        row_sum.fill(0)
        out.fill(0)
        _core.attend_block(
            q, k, v, ranges, ranges, row_max, row_sum, out, kv_head_of_q, scale, causal, 0, 0.0,
            workspace, threads, isa,
        )  # fmt: skip
        _core.finish(row_max, row_sum, out, o, lse, threads, isa)

    peer = None
    if torch is not None:
        tensors = [_tensor(torch, a).permute(1, 0, 2)[None].contiguous() for a in (q, k, v)]
        attention = torch.nn.functional.scaled_dot_product_attention
        peer = _discard(attention, *tensors, is_causal=causal)
    area = tokens * (tokens + 1) // 2 if causal else tokens * tokens
    return Case(
        "attention", dtype, head_dim, causal, tokens, f"{tokens}x1x{head_dim}",
        4 * area * head_dim, run, lambda: _attention_error(q, k, v, o, causal), peer,
    )  # fmt: skip


def cases(dtypes: Sequence[str], threads: int, isa: str, torch: Any) -> Iterator[Case]:
    """Prepare every case in turn, so that only one case's arrays live at a time."""
    for dtype in dtypes:
        for shape in _SHAPES:
            yield linear_case(shape, dtype, threads, isa, torch)
        for head_dim in _HEAD_DIMS:
            for causal in (False, True):
                for tokens in _TOKENS:
                    yield attention_case(tokens, head_dim, causal, dtype, threads, isa, torch)


def _elapsed(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _summary(seconds: Sequence[float]) -> Seconds:
    return Seconds(statistics.median(seconds), min(seconds), max(seconds))


def measure(case: Case, peak: float, iterations: int, threads: int, isa: str) -> Result:
    """Check a case, then time it, alternating with its peer.

    Args:
        case: what to run.
        peak: flop/s of the multiply-add loop on as many cores.
        iterations: timed runs of each side, after one warm-up.
        threads: threads that the case was made for.
        isa: instruction set that the case was made for.

    Raises:
        SystemExit: if the error exceeds the dtype's tolerance; nothing unchecked is timed.
    """
    case.run()
    error, tolerance = case.error(), TOLERANCE[case.dtype]
    if not error <= tolerance:
        raise SystemExit(
            f"{case.kernel} {case.dtype} {case.shape}: relative error: "
            f"expected at most {tolerance:g}, got {error:g}"
        )
    if case.peer is not None:
        case.peer()
    ours, peers = [], []
    for _ in range(iterations):
        ours.append(_elapsed(case.run))
        if case.peer is not None:
            peers.append(_elapsed(case.peer))
    step = _summary(ours)
    peer_seconds = _summary(peers) if peers else None
    return Result(
        kernel=case.kernel,
        dtype=case.dtype,
        head_dim=case.head_dim,
        causal=case.causal,
        tokens=case.tokens,
        shape=case.shape,
        isa=isa,
        threads=threads,
        iterations=iterations,
        flops=case.flops,
        step_seconds=step,
        gflops=case.flops / step.median / 1e9,
        peak_fraction=case.flops / step.median / peak,
        peer_seconds=peer_seconds,
        peer_ratio=None if peer_seconds is None else peer_seconds.median / step.median,
        error=error,
        tolerance=tolerance,
        checked_rows=min(case.tokens, _CHECKED_ROWS),
    )


def table(results: Sequence[Result], title: str) -> Table:
    """Lay results out, one row a case."""
    grid = Table(title=title, caption=f"error: relative, {_CHECKED_ROWS} sampled rows (or all)")
    for name in ("kernel", "dtype", "shape", "head_dim", "causal"):
        grid.add_column(name, no_wrap=True)
    for name in ("tokens", "GFLOP/s", "min..max", "peak", "torch", "error"):
        grid.add_column(name, justify="right", no_wrap=True)
    for result in results:
        step = result.step_seconds
        slowest, fastest = result.flops / step.max / 1e9, result.flops / step.min / 1e9
        attention = result.kernel == "attention"
        grid.add_row(
            result.kernel,
            result.dtype,
            result.shape,
            str(result.head_dim) if attention else "-",
            ("yes" if result.causal else "no") if attention else "-",
            str(result.tokens),
            f"{result.gflops:.0f}",
            f"{slowest:.0f}..{fastest:.0f}",
            f"{result.peak_fraction:.0%}",
            "-" if result.peer_ratio is None else f"{result.peer_ratio:.2f}x",
            f"{result.error:.1e}",
        )
    return grid


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pympa.bench.kernels", description="Check and time the CPU kernels."
    )
    parser.add_argument("--against", choices=["torch"], help="alternate with a peer")
    parser.add_argument("--threads", type=int, default=1, help="threads of a kernel (default 1)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="only this dtype (default: all)")
    parser.add_argument(
        "--isa", choices=_core.supported_isas(), default=_core.supported_isas()[0],
        help="instruction set (default: the best)",
    )  # fmt: skip
    parser.add_argument("--iterations", type=int, default=7, help="timed runs (default 7)")
    parser.add_argument("--output", type=argparse.FileType("w"), help="JSON lines, one a case")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in ("threads", "iterations"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    output: TextIO | None = options.output
    torch = _torch(options.threads) if options.against == "torch" else None
    dtypes = [options.dtype] if options.dtype else list(DTYPES)
    peaks = {dtype: _core.fma_peak(dtype, options.isa, 0.5) * options.threads for dtype in dtypes}
    # Rich takes a pipe for 80 columns wide, too few for this table.
    console = Console() if sys.stdout.isatty() else Console(width=_PIPE_COLUMNS)
    progress = Console(stderr=True)
    results = []
    for case in cases(dtypes, options.threads, options.isa, torch):
        progress.print(f"{case.kernel} {case.dtype} {case.shape} causal={case.causal}")
        peak = peaks[case.dtype]
        result = measure(case, peak, options.iterations, options.threads, options.isa)
        results.append(result)
        if output is not None:
            print(json.dumps({"schema": 1, **asdict(result)}), file=output, flush=True)
    peak_text = ", ".join(f"{dtype} {peak / 1e9:.0f}" for dtype, peak in peaks.items())
    title = f"{options.isa}, {options.threads} thread(s); peak GFLOP/s: {peak_text}"
    console.print(table(results, title))
    return 0


if __name__ == "__main__":
    sys.exit(main())
