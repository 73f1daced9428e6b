"""Cases of attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pympa.bench.kernels.cases.workbench import Case, Workbench, relative_error, sample_rows, wide
from pympa.kernels import AttentionSpec, KvBlock, State
from pympa.plan.layout import Layout, Range
from pympa.verify import reference


def attention_case(
    bench: Workbench,
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
    causal: bool,
    kv_heads: int | None = None,
) -> Case:
    """Prepare attention of one sequence from an empty state to the normalised output.

    Args:
        bench: the workbench that makes the arrays.
        queries: the number of last positions of the sequence: all of them, or 1 to decode.
        keys: the number of tokens of the sequence.
        heads: the number of query heads.
        head_dim: the dimension of the heads of queries, keys and values.
        causal: whether later keys are hidden. The last position sees all keys either way.
        kv_heads: the number of heads of keys and values, a divisor of `heads`; default: `heads`.
    """
    q, o = bench.normal(queries, heads, head_dim), bench.empty(queries, heads, head_dim)
    kv_heads = heads if kv_heads is None else kv_heads
    k, v = bench.normal(keys, kv_heads, head_dim), bench.normal(keys, kv_heads, head_dim)
    row_max, row_sum, lse = (bench.arena.empty((queries, heads), np.float32) for _ in range(3))
    state = State(row_max, row_sum, bench.arena.empty(o.shape, np.float32))
    q_layout = Layout((Range(0, keys - queries, queries),))
    kv = KvBlock(k, v, Layout((Range(0, 0, keys),)))
    kv_head_of_q = (np.arange(heads) // (heads // kv_heads)).astype(np.int32)
    scale = head_dim**-0.5
    spec = AttentionSpec(kv_head_of_q, scale, causal)
    rows = sample_rows(queries)

    def run() -> None:
        bench.kernels.start_state(state)
        bench.kernels.attend_block(q, q_layout, kv, state, spec)
        bench.kernels.finish(state, o, lse)

    def error() -> float:
        want, _ = reference.attention(
            wide(q[rows]),
            wide(k),
            wide(v),
            rows + (keys - queries),
            np.arange(keys),
            kv_head_of_q=kv_head_of_q.tolist(),
            scale=scale,
            causal=causal,
        )
        return relative_error(o[rows], want)

    def peer(torch: Any) -> Callable[[], Any]:
        # The layout that is fastest in torch: [1, heads, tokens, head_dim].
        tensors = [bench.tensor(a).permute(1, 0, 2)[None].contiguous() for a in (q, k, v)]
        attend = torch.nn.functional.scaled_dot_product_attention
        return partial(
            attend, *tensors, is_causal=causal and queries > 1, enable_gqa=kv_heads < heads
        )

    area = queries * keys - (queries * (queries - 1) // 2 if causal else 0)
    return Case(
        kernel="attention",
        shape=f"{queries}x{keys}x{heads}" + (f"/{kv_heads}" if kv_heads < heads else ""),
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
