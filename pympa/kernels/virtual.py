"""Kernels on shapes: sizes are computed, numbers are not.

On a dry arena the same strategies run through the same allocations and messages without memory
or time, which tells what a rank will need and send before it does.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa import _core
from pympa.arena import Arena, Array
from pympa.kernels.cpu import CpuKernels
from pympa.trace import Trace

_SIZES = ("packed_weight_bytes", "linear_workspace_bytes", "attention_workspace_bytes")
_WORK = (
    "pack_weight",
    "linear",
    "gated_linear",
    "attend_block",
    "score_tile",
    "fold_tile",
    "merge",
    "finish",
    "rope",
    "norm",
    "gather_rows",
    "count_experts",
    "drop_overflow",
    "combine_rows",
    "add",
    "sum_partials",
)


def _nothing(**_: Any) -> None:
    """Stand in for a kernel."""


def _all_finite(**_: Any) -> int:
    """Stand in for `select_experts`."""
    return -1


def _spread_evenly(*, experts: Array, counts: NDArray[np.int64], **_: Any) -> None:
    """Stand in for `sort_rows`."""
    counts[:] = (experts.size + np.arange(len(counts))[::-1]) // len(counts)


_SHAPE_CORE = SimpleNamespace(
    **{name: getattr(_core, name) for name in _SIZES},
    **dict.fromkeys(_WORK, _nothing),
    select_experts=_all_finite,
    sort_rows=_spread_evenly,
)


class VirtualKernels(CpuKernels):
    """The CPU kernels' shapes and workspaces, without their work."""

    piece_flops = math.inf  # no message moves meanwhile, so attention needs no pieces

    def __init__(self, *, isa: str, threads: int, arena: Arena, trace: Trace) -> None:
        super().__init__(isa=isa, threads=threads, arena=arena, trace=trace, core=_SHAPE_CORE)
