"""The cases of the kernel benchmark: sizes, run, check, peer, and number of flops and bytes.

Only useful flops count. Bytes count each input read once and each result written once, but not
what a kernel computes or reads again, or stores between its parts. `size` is the number of bytes
of an element:

| kernel | flops | bytes / size |
|---|---|---|
| linear | 2 m n k | m k + n k + m n |
| mlp | 4 rows width hidden | 2 rows width + 2 width hidden |
| gated_mlp | 6 rows width hidden | 2 rows width + 3 width hidden |
| even_moe, skewed_moe | 4 rows top_k width hidden + 2 rows width experts | 2 rows width \
+ experts (2 width hidden + width + 1) |
| attention | 4 area heads head_dim | 2 (queries heads + keys kv_heads) head_dim |
| rms_norm | 4 rows columns | 2 rows columns + columns |
| layer_norm | 7 rows columns | 2 rows columns + 2 columns |
| rope | 3 rows heads head_dim | 2 rows heads head_dim + 4 rows head_dim / size (tables) |

`area` is the number of pairs (query, key) in which the query sees the key: queries keys, or
tokens (tokens + 1) / 2 under a causal mask. Memory-bound shapes (decoding, layers over
few rows, norms) use about 100 MB or more, so that they do not fit the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pympa.bench.kernels.cases.attention import attention_case
from pympa.bench.kernels.cases.linear import linear_case, mlp_case
from pympa.bench.kernels.cases.moe import moe_case
from pympa.bench.kernels.cases.rows import norm_case, rope_case
from pympa.bench.kernels.cases.workbench import Case, Workbench

MakeCase = Callable[[Workbench], Case]


def _attention(tokens: int, sizes: tuple[int, int], causal: bool) -> MakeCase:
    heads, head_dim = sizes
    return lambda bench: attention_case(bench, tokens, tokens, heads, head_dim, causal)


def _decode(heads: int, kv_heads: int, head_dim: int) -> MakeCase:
    return lambda bench: attention_case(bench, 1, 32768, heads, head_dim, True, kv_heads)


_FEW_ROWS = tuple((m, 14336, 4096) for m in (1, 2, 4, 8))  # sequences that decode together
_LINEAR = ((2048, 2048, 2048), (512, 4096, 1024), *_FEW_ROWS)  # m, n, k
_HEADS = ((8, 64), (4, 128), (1, 512))  # heads, head_dim; similar work for each
_DECODE = ((16, 16, 64), (8, 8, 128), (2, 2, 512), (32, 8, 128))  # heads, kv_heads, head_dim
CASES: dict[str, list[MakeCase]] = {
    "linear": [partial(linear_case, m=m, n=n, k=k) for m, n, k in _LINEAR],
    "mlp": [
        *(partial(mlp_case, rows=512, width=1024, hidden=4096, gated=g) for g in (False, True)),
        partial(mlp_case, rows=4, width=2048, hidden=8192, gated=True),
    ],
    "moe": [
        partial(moe_case, rows=rows, width=1024, hidden=4096, experts=8, top_k=2, skewed=skewed)
        for rows, skewed in ((2048, False), (2048, True), (16, False))
    ],
    "attention": [
        _attention(tokens, sizes, causal)
        for sizes in _HEADS
        for causal in (False, True)
        for tokens in (1024, 4096)
    ]
    + [_decode(*sizes) for sizes in _DECODE],
    "norm": [partial(norm_case, rows=8192, columns=4096, kind=kind) for kind in ("rms", "layer")],
    "rope": [partial(rope_case, rows=16384, heads=32, head_dim=128)],
}
"""The cases to run, by the names of `--kernel`."""
