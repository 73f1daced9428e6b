"""The cases of the kernel benchmark: sizes, how to run, check and compare, and what it costs.

Flops are the useful ones, bytes are each input read once and each result written once; what a
kernel recomputes, reads again or keeps between its parts does not count. With `size` bytes an
element:

| kernel | flops | bytes / size |
|---|---|---|
| linear | 2 m n k | m k + n k + m n |
| mlp | 4 rows width hidden | 2 rows width + 2 width hidden |
| gated_mlp | 6 rows width hidden | 2 rows width + 3 width hidden |
| attention | 4 area heads head_dim | 2 (queries + keys) heads head_dim |
| rms_norm | 4 rows columns | 2 rows columns + columns |
| layer_norm | 7 rows columns | 2 rows columns + 2 columns |
| rope | 3 rows heads head_dim | 2 rows heads head_dim + 4 rows head_dim / size (tables) |

`area` is the number of pairs (query, key) that see each other: queries keys, or
tokens (tokens + 1) / 2 under a causal mask. Memory-bound shapes take more than
100 MB, to be out of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa import reference
from pympa.arena import Arena, Array
from pympa.kernels import AttentionSpec, KvBlock, PackedWeight, State
from pympa.kernels.cpu import CpuKernels
from pympa.layout import Layout, Range
from pympa.reference import F64
from pympa.spec import DTYPES
from pympa.trace import Trace

CHECKED_ROWS = 16
_EPS = 1e-6
_THETA = 10000.0


@dataclass(frozen=True)
class Case:
    """One kernel on one shape, ready to run.

    Attributes:
        kernel: its name. shape: sizes joined by "x". tokens: rows that come out.
        head_dim: None where there are no heads. causal: None where there is no mask.
        flops, bytes: of one run, by the formulas above.
        run: runs the kernel once. out: where it leaves its result.
        error: after the first run: relative error of some rows. checked_rows: how many.
        peer: runs torch's counterpart once and returns its result, or None.
    """

    kernel: str
    shape: str
    tokens: int
    flops: int
    bytes: int
    run: Callable[[], None]
    out: Array
    error: Callable[[], float]
    checked_rows: int
    peer: Callable[[], Any] | None
    head_dim: int | None = None
    causal: bool | None = None


class Workbench:
    """Makes what one case needs, in an arena as in a real run.

    Args:
        dtype: element type of the case.
        isa: instruction set.
        threads: of each kernel.
        torch: the module to compare with, or None.
    """

    def __init__(self, dtype: str, isa: str, threads: int, torch: Any = None) -> None:
        self.dtype = DTYPES[dtype]
        self.arena = Arena()
        self.kernels = CpuKernels(isa=isa, threads=threads, arena=self.arena, trace=Trace())
        self._torch = torch
        self._rng = np.random.default_rng(0)

    def empty(self, *shape: int) -> Array:
        """Return an uninitialised array of the dtype."""
        return self.arena.empty(shape, self.dtype)

    def normal(self, *shape: int) -> Array:
        """Return standard normal numbers, rounded to the dtype."""
        array = self.empty(*shape)
        array[...] = self._rng.standard_normal(shape, np.float32)
        return array

    def weight(self, n: int, k: int) -> tuple[Array, PackedWeight]:
        """Return a weight `[n, k]` that keeps the variance of its input, and its packed copy."""
        weight = self.normal(n, k)
        weight *= self.dtype.type(k**-0.5)
        return weight, self.kernels.pack((n, k), self.dtype, partial(_fill, weight))

    def peer(self, prepare: Callable[[Any], Callable[[], Any]]) -> Callable[[], Any] | None:
        """Return what `prepare` makes of torch, or None without torch."""
        return None if self._torch is None else prepare(self._torch)

    def tensor(self, array: Array) -> Any:
        """Return a tensor on the memory of an array of the dtype."""
        bits = array.view(f"i{array.itemsize}")  # torch takes no bfloat16 of NumPy
        return self._torch.from_numpy(bits).view(getattr(self._torch, array.dtype.name))


def linear_case(bench: Workbench, m: int, n: int, k: int) -> Case:
    """Prepare x `[m, k]` times a weight `[n, k]`."""
    x, out, rows = bench.normal(m, k), bench.empty(m, n), _sample(m)
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
        error=lambda: _error(out[rows], reference.linear(_wide(x[rows]), _wide(weight))),
        checked_rows=len(rows),
        peer=bench.peer(peer),
    )


def mlp_case(bench: Workbench, rows: int, width: int, hidden: int, gated: bool) -> Case:
    """Prepare an MLP of x `[rows, width]`: GELU (tanh), or gated by SiLU (Shazeer 2020)."""
    x, between, out = bench.normal(rows, width), bench.empty(rows, hidden), bench.empty(rows, width)
    up, packed_up = bench.weight(hidden, width)
    down, packed_down = bench.weight(width, hidden)
    gate, packed_gate = bench.weight(hidden, width) if gated else (None, None)
    activation, sample = "silu" if gated else "gelu_tanh", _sample(rows)

    def run() -> None:
        if packed_gate is None:
            bench.kernels.linear(x, packed_up, between, activation=activation)
        else:
            bench.kernels.gated_linear(x, packed_gate, packed_up, between, activation=activation)
        bench.kernels.linear(between, packed_down, out)

    def error() -> float:
        wide_gate = None if gate is None else _wide(gate)
        want = reference.mlp(_wide(x[sample]), _wide(up), _wide(down), wide_gate, activation)
        return _error(out[sample], want)

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
        run=run,
        out=out,
        error=error,
        checked_rows=len(sample),
        peer=bench.peer(peer),
    )


def attention_case(
    bench: Workbench, queries: int, keys: int, heads: int, head_dim: int, causal: bool
) -> Case:
    """Prepare attention of one sequence from an empty state to the normalised output.

    Args:
        bench: makes the arrays.
        queries: the last positions of the sequence: all of them, or 1 to decode.
        keys: tokens of the sequence.
        heads: of queries, keys and values.
        head_dim: of queries, keys and values.
        causal: hide later keys. The last position sees all keys either way.
    """
    q, o = bench.normal(queries, heads, head_dim), bench.empty(queries, heads, head_dim)
    k, v = bench.normal(keys, heads, head_dim), bench.normal(keys, heads, head_dim)
    row_max, row_sum, lse = (bench.arena.empty((queries, heads), np.float32) for _ in range(3))
    state = State(row_max, row_sum, bench.arena.empty(o.shape, np.float32))
    q_layout = Layout((Range(0, keys - queries, queries),))
    kv = KvBlock(k, v, Layout((Range(0, 0, keys),)))
    kv_head_of_q, scale = np.arange(heads, dtype=np.int32), head_dim**-0.5
    spec = AttentionSpec(kv_head_of_q, scale, causal)
    rows = _sample(queries)

    def run() -> None:
        bench.kernels.start_state(state)
        bench.kernels.attend_block(q, q_layout, kv, state, spec)
        bench.kernels.finish(state, o, lse)

    def error() -> float:
        want, _ = reference.attention(
            _wide(q[rows]),
            _wide(k),
            _wide(v),
            rows + (keys - queries),
            np.arange(keys),
            kv_head_of_q=list(range(heads)),
            scale=scale,
            causal=causal,
        )
        return _error(o[rows], want)

    def peer(torch: Any) -> Callable[[], Any]:
        # The layout that torch likes best: [1, heads, tokens, head_dim].
        tensors = [bench.tensor(a).permute(1, 0, 2)[None].contiguous() for a in (q, k, v)]
        attend = torch.nn.functional.scaled_dot_product_attention
        return partial(attend, *tensors, is_causal=causal and queries > 1)

    area = queries * keys - (queries * (queries - 1) // 2 if causal else 0)
    return Case(
        kernel="attention",
        shape=f"{queries}x{keys}x{heads}",
        tokens=queries,
        head_dim=head_dim,
        causal=causal,
        flops=4 * area * heads * head_dim,
        bytes=q.nbytes + k.nbytes + v.nbytes + o.nbytes,
        run=run,
        out=o,
        error=error,
        checked_rows=len(rows),
        peer=bench.peer(peer),
    )


def norm_case(bench: Workbench, rows: int, columns: int, kind: str) -> Case:
    """Prepare RMSNorm ("rms", with a gain) or LayerNorm ("layer", with gain and bias)."""
    x, out, sample = bench.normal(rows, columns), bench.empty(rows, columns), _sample(rows)
    weight, bias = bench.normal(columns), bench.normal(columns) if kind == "layer" else None

    def error() -> float:
        wide_bias = None if bias is None else _wide(bias)
        want = reference.norm(_wide(x[sample]), _wide(weight), wide_bias, _EPS, kind)
        return _error(out[sample], want)

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
    x, sample = bench.normal(rows, heads, head_dim), _sample(rows)
    before = _wide(x[sample])
    frequency = _THETA ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = np.arange(rows)[:, None] * frequency
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    index = np.arange(rows, dtype=np.int32)

    def error() -> float:
        return _error(x[sample], reference.rope(before, sample, _THETA, head_dim, 1.0))

    def peer(torch: Any) -> Callable[[], Any]:
        # The usual eager formula: no operation of torch's own does it.
        tx, tables = (
            bench.tensor(x),
            (np.tile(t[:, None], 2).astype(bench.dtype) for t in (cos, sin)),
        )
        tcos, tsin = (bench.tensor(table) for table in tables)
        half = head_dim // 2

        def turn() -> Any:
            return tx * tcos + torch.cat((-tx[..., half:], tx[..., :half]), dim=-1) * tsin

        return turn

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


def _fill(source: Array, target: Array) -> None:
    target[...] = source


def _sample(rows: int) -> NDArray[np.int64]:
    """Return some row indices: the first, the last and evenly between, all if there are few."""
    return np.unique(np.linspace(0, rows - 1, CHECKED_ROWS).astype(np.int64))


def _wide(array: Array) -> F64:
    return array.astype(np.float64)


def _error(got: Array, want: F64) -> float:
    return float(np.linalg.norm(_wide(got) - want) / np.linalg.norm(want))


MakeCase = Callable[[Workbench], Case]


def _attention(queries: int, keys: int, sizes: tuple[int, int], causal: bool = True) -> MakeCase:
    heads, head_dim = sizes
    return lambda bench: attention_case(bench, queries, keys, heads, head_dim, causal)


_LINEAR = ((2048, 2048, 2048), (512, 4096, 1024), (1, 14336, 4096))  # m, n, k
_HEADS = ((8, 64), (4, 128), (1, 512))  # heads, head_dim; similar work for each
_DECODE_HEADS = ((16, 64), (8, 128), (2, 512))
CASES: dict[str, list[MakeCase]] = {
    "linear": [partial(linear_case, m=m, n=n, k=k) for m, n, k in _LINEAR],
    "mlp": [partial(mlp_case, rows=512, width=1024, hidden=4096, gated=g) for g in (False, True)],
    "attention": [
        _attention(tokens, tokens, sizes, causal)
        for sizes in _HEADS
        for causal in (False, True)
        for tokens in (1024, 4096)
    ]
    + [_attention(1, 32768, sizes) for sizes in _DECODE_HEADS],
    "norm": [partial(norm_case, rows=8192, columns=4096, kind=kind) for kind in ("rms", "layer")],
    "rope": [partial(rope_case, rows=16384, heads=32, head_dim=128)],
}
"""The cases that are run, by the name for `--kernel`."""
