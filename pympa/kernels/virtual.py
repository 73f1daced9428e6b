"""Kernels on shapes: sizes are computed, numbers are not.

On a dry arena the same strategies run through the same allocations and messages without memory
or time, which tells what a rank will need and send before it does. With costs, kernels let a
virtual clock go on, which tells when.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa import _core
from pympa.accounting import block_pairs
from pympa.arena import Arena, Array
from pympa.costs import Costs
from pympa.kernels.cpu import CpuKernels
from pympa.layout import Layout, Range
from pympa.trace import Trace

_DEVICE_ROWS = 65536  # of an MLP, or on their way to experts, at a time: enough to fill a device

_SIZES = (
    "packed_weight_bytes",
    "linear_workspace_bytes",
    "mlp_workspace_bytes",
    "attention_workspace_bytes",
)
_WORK = (
    "pack_weight",
    "linear",
    "gated_linear",
    "mlp",
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
    "copy",
    "fill",
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


class _TimedCore:
    """Stand-ins that let a clock go on by what a device would take."""

    select_experts = staticmethod(_SHAPE_CORE.select_experts)

    def __init__(
        self, costs: Costs, advance: Callable[[float], None], loads: Sequence[float] | None
    ) -> None:
        self._costs = costs
        self._advance = advance
        self._loads = loads

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a size of the CPU's kernels, or a kernel that moves its arrays."""
        if name in _SIZES:
            size: Callable[..., Any] = getattr(_core, name)
            return size
        return self._move

    def sort_rows(self, *, experts: Array, counts: NDArray[np.int64], **others: Any) -> None:
        """Give each expert its share of the rows, as near as whole rows come."""
        if self._loads is None or len(self._loads) != len(counts):
            _spread_evenly(experts=experts, counts=counts)
            return
        ends = np.cumsum(self._loads) / sum(self._loads) * experts.size
        counts[:] = np.diff(np.rint(ends).astype(np.int64), prepend=0)

    def linear(self, *, x: Array, packed: Array, out: Array, **others: Any) -> None:
        """Advance by a product, or one for each group of rows."""
        self._multiply(x, out, _nbytes(x, packed, out, *others.values()), others, 1)

    def gated_linear(
        self, *, x: Array, packed_gate: Array, packed_up: Array, out: Array, **others: Any
    ) -> None:
        """Advance by two products of the same rows."""
        moved = _nbytes(x, packed_gate, packed_up, out, *others.values())
        self._multiply(x, out, moved, others, 2)

    def attend_block(
        self, *, q: Array, k: Array, v: Array, out: Array, causal: bool, window: int, **others: Any
    ) -> None:
        """Advance by attention over the pairs that the masks let through."""
        ranges = others["q_ranges"].tobytes(), others["k_ranges"].tobytes()
        whole, cut, pairs = _count_pairs(*ranges, causal, window)
        moved, heads = _nbytes(q, k, v) + 2 * out.nbytes, (q.shape[1], q.shape[2], v.shape[2])
        seconds = self._costs.attention(whole, whole, *heads, 0)
        seconds += self._costs.attention(cut, pairs, *heads, 0)
        self._advance(max(seconds, self._costs.memory(moved)))

    def merge(self, *, out: Array, **others: Any) -> None:
        """Advance by reading two states and writing one."""
        self._move(out=out, again=out, **others)

    def score_tile(self, *, q: Array, k: Array, scores: Array, **others: Any) -> None:
        """Advance by a product of queries and keys."""
        rows, heads, dim = q.shape
        self._advance(self._costs.linear(rows * heads, len(k), dim, _nbytes(q, k, scores)))

    def fold_tile(self, *, scores: Array, v: Array, out: Array, **others: Any) -> None:
        """Advance by a product of probabilities and values."""
        rows, heads, keys = scores.shape
        moved = _nbytes(scores, v) + 2 * out.nbytes
        self._advance(self._costs.linear(rows * heads, v.shape[2], keys, moved))

    def _multiply(
        self, x: Array, out: Array, moved: int, others: dict[str, Any], products: int
    ) -> None:
        groups = others.get("group_rows")
        rows = [len(x)] if groups is None else [int(count) for count in groups]
        n, k = products * out.shape[1], x.shape[1]
        compute = sum(self._costs.linear(m, n, k, 0) for m in rows)
        self._advance(max(compute, self._costs.memory(moved)))

    def _move(self, **arrays: Any) -> None:
        arrays.pop("workspace", None)
        self._advance(self._costs.memory(_nbytes(*arrays.values())))


@lru_cache(maxsize=1 << 17)  # blocks of a ring of 256 ranks
def _count_pairs(
    q_ranges: bytes, k_ranges: bytes, causal: bool, window: int
) -> tuple[int, int, int]:
    """Return the pairs of query and key in blocks that no mask cuts, and in those that one does.

    A block is a range of queries and one of keys. Of blocks that are cut, the pairs that the mask
    lets through and all of them. Layers repeat the same blocks, and the ranks of `tp` have the same
    ones.
    """
    arrays = (np.frombuffer(ranges, np.int64).reshape(-1, 3) for ranges in (q_ranges, k_ranges))
    q, k = (Layout(tuple(Range(*r) for r in array.tolist())) for array in arrays)
    whole = cut = pairs = 0
    for (of_q, of_k), count in Counter(
        (spans, k.spans[s]) for s, spans in q.spans.items() if s in k.spans
    ).items():
        for a, b in itertools.product(of_q, of_k):
            visible = block_pairs(a, b, causal, window or None)
            if visible == a[1] * b[1]:
                whole += count * visible
            elif visible:
                cut, pairs = cut + count * visible, pairs + count * a[1] * b[1]
    return whole, cut, pairs


def _nbytes(*values: Any) -> int:
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))


class VirtualKernels(CpuKernels):
    """The CPU kernels' shapes and workspaces, without their work.

    Args:
        isa: whose workspaces. threads: of each.
        arena: a dry one.
        trace: collects the time of each kernel.
        costs: what kernels take; None means no time.
        advance: lets the rank's clock go on.
        loads: rows of each expert, in any unit; None means even ones.
    """

    piece_flops = math.inf  # messages move by themselves, so attention needs no pieces

    def __init__(
        self,
        *,
        isa: str,
        threads: int,
        arena: Arena,
        trace: Trace,
        costs: Costs | None = None,
        advance: Callable[[float], None] = lambda seconds: None,
        loads: Sequence[float] | None = None,
    ) -> None:
        core: Any = _SHAPE_CORE if costs is None else _TimedCore(costs, advance, loads)
        super().__init__(isa=isa, threads=threads, arena=arena, trace=trace, core=core)
        if costs is not None:
            self.row_chunk, self.dispatch_rows = _DEVICE_ROWS, _DEVICE_ROWS
            self.fuses_mlp = False

    def _copy(self, source: Array, out: Array) -> None:
        self._core.copy(source=source, out=out)

    def _fill(self, array: Array, value: float) -> None:
        self._core.fill(array=array)
