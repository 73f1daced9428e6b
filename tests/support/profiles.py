"""A machine whose kernels take what simple formulas say, as curves of a calibrated profile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pympa.costs.cluster import Cluster, Device, Link
from pympa.costs.curves import Curve

CALL, BETWEEN, FAR, CACHE_BYTES = 1e-5, 2e-5, 1e-4, 1 << 24


def curve(
    kernel: str, seconds: Callable[..., Any], *sizes: tuple[int, ...], dtype: str = "float32",
    ranks: int = 1,
) -> Curve:  # fmt: skip
    """Return the curve of a formula on a grid of sizes."""
    grid = np.meshgrid(*map(np.array, sizes), indexing="ij")
    values = np.broadcast_to(seconds(*grid), [len(axis) for axis in sizes])
    return Curve(
        kernel=kernel, dtype=dtype, ranks=ranks, sizes=sizes, seconds=tuple(values.ravel().tolist())
    )


def profile(
    *, shares_memory: bool = False, ranks: int = 64,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
) -> Cluster:  # fmt: skip
    """Return the machine."""
    curves = [
        made
        for dtype in dtypes
        for made in (
            curve("call.linear", lambda: CALL, dtype=dtype),
            curve("call.attend_block", lambda: CALL, dtype=dtype),
            curve("linear", lambda m, n, k: CALL + 1e-11 * m * n * k, (1, 96), (16, 64), (16, 64),
                  dtype=dtype),
            curve("attend_block", lambda r, k, d: 1e-11 * r * k * d, (1, 96), (16, 512), (16, 64),
                  dtype=dtype),
            curve("mlp", lambda m, n, k: CALL + 2e-11 * m * n * k, (1, 96), (16, 64), (16, 64),
                  dtype=dtype),
            curve("weights", lambda m: FAR + 0 * m, (1, 96), dtype=dtype),
            curve("copy", lambda r, b: CALL + 1e-10 * r * b, (1, 64), (64, 512), dtype=dtype),
            *(curve(f"activation.{name}", lambda r, n: 1e-10 * r * n, (1, 96), (16, 64),
                    dtype=dtype) for name in ("gelu", "gelu_tanh", "silu")),
            curve("between", lambda b: BETWEEN + 0 * b, (1, 1 << 60), dtype=dtype),
        )
    ]  # fmt: skip
    device = Device(
        name="formulas",
        memory_bytes=1 << 30,
        memory_bytes_per_second=1e10,
        flops_per_second=dict.fromkeys(dtypes, 1e11),
        curves=tuple(curves),
        cache_bytes=CACHE_BYTES,
    )
    link = Link(
        name="node", ranks=ranks, latency_seconds=1e-5, bytes_per_second=1e9,
        start_seconds=1e-5, large_start_seconds=5e-5, message_seconds=1e-6,
        shares_memory=shares_memory,
    )  # fmt: skip
    return Cluster(title="formulas", ranks=ranks, device=device, links=(link,))
