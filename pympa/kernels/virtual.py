"""Kernels on shapes: sizes are computed, numbers are not.

On a dry arena the same strategies run through the same allocations and messages without memory
or time, which tells what a rank will need and send before it does. With costs, kernels let a
virtual clock go on, which tells when.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa import _core
from pympa.arena import Arena, Array
from pympa.calls import Attended, Multiplied
from pympa.costs import Costs
from pympa.kernels import Core
from pympa.kernels.core import CoreKernels
from pympa.kernels.cpu import PIECE_FLOPS, cache_bytes
from pympa.kernels.cuda import DEVICE_ROWS, Accelerator
from pympa.kernels.extents import extent, nbytes
from pympa.trace import Trace

_SIZES = (
    "packed_weight_bytes",
    "linear_workspace_bytes",
    "mlp_workspace_bytes",
    "attention_workspace_bytes",
    "decode_workspace_bytes",
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
    "start_state",
)


def _nothing(**_: Any) -> None:
    """Stand in for a kernel."""


def _all_finite(**_: Any) -> int:
    """Stand in for `select_experts`."""
    return -1


def _spread_evenly(*, experts: Array, counts: NDArray[np.int64], **_: Any) -> None:
    """Stand in for `sort_rows`."""
    counts[:] = (experts.size + np.arange(len(counts))[::-1]) // len(counts)


def _shape_core(sizes: Core) -> Core:
    """Return stand-ins that do nothing and take no time."""
    return SimpleNamespace(
        **{name: getattr(sizes, name) for name in _SIZES if hasattr(sizes, name)},
        **dict.fromkeys(_WORK, _nothing),
        select_experts=_all_finite,
        sort_rows=_spread_evenly,
    )


_SHAPE_CORE = _shape_core(_core)


class _TimedCore:
    """Stand-ins that let a clock go on by what a device would take."""

    def __init__(
        self,
        costs: Costs,
        advance: Callable[[float], None],
        loads: Sequence[float] | None,
        routing: Sequence[NDArray[np.int64]] | None,
    ) -> None:
        self._costs = costs
        self._advance = advance
        self._loads = loads
        self._weight_bytes = 0
        self._routing = None if routing is None else itertools.cycle(routing)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a size of the CPU's kernels, or a kernel that moves its arrays."""
        if name in _SIZES:
            size: Callable[..., Any] = getattr(_core, name)
            return size
        return partial(self._move, name)

    def pack_weight(self, *, packed: Array, **_: Any) -> None:
        """Take note of a weight; loading is no part of a step."""
        self._weight_bytes += packed.nbytes

    def linear(self, *, x: Array, packed: Array, out: Array, **others: Any) -> None:
        """Advance by a product, or one for each group of rows."""
        moved = nbytes(x, packed, out, *others.values())
        self._advance(self._costs.linears(self._call(x, out.shape[1], moved, others)))

    def gated_linear(
        self, *, x: Array, packed_gate: Array, packed_up: Array, out: Array, **others: Any
    ) -> None:
        """Advance by two products of the same rows."""
        moved = nbytes(x, packed_gate, packed_up, out, *others.values())
        call = self._call(x, out.shape[1], moved, others)
        self._advance(self._costs.linears(call._replace(gated=True)))

    def mlp(self, *, x: Array, out: Array, packed_gate: Any, hidden: int, **others: Any) -> None:
        """Advance by an MLP in one pass."""
        moved = nbytes(x, out, packed_gate, *others.values())
        call = self._call(x, hidden, moved, others)
        self._advance(self._costs.mlp(call._replace(gated=packed_gate is not None), out.shape[1]))

    def attend_block(
        self, *, q: Array, k: Array, v: Array, out: Array, causal: bool, window: int, **others: Any
    ) -> None:
        """Advance by attention over the pairs that the masks let through."""
        ranges = others["q_ranges"].tobytes(), others["k_ranges"].tobytes()
        heads = q.shape[1], k.shape[1], q.shape[2], v.shape[2]
        moved = nbytes(q, k, v) + 2 * out.nbytes
        self._advance(self._costs.attend(Attended(*ranges, causal, window or None, *heads, moved)))

    def score_tile(self, *, q: Array, k: Array, scores: Array, **_: Any) -> None:
        """Advance by a product of queries and keys."""
        rows, heads, dim = q.shape
        self._product(rows * heads, len(k), dim, nbytes(q, k, scores))

    def fold_tile(self, *, scores: Array, v: Array, out: Array, **_: Any) -> None:
        """Advance by a product of probabilities and values."""
        rows, heads, keys = scores.shape
        self._product(rows * heads, v.shape[2], keys, nbytes(scores, v) + 2 * out.nbytes)

    def norm(self, *, kind: str, **arrays: Any) -> None:
        """Advance by RMSNorm or LayerNorm."""
        self._advance(self._costs.by_rows(f"norm.{kind}", *extent("norm", arrays)))

    def select_experts(self, **arrays: Any) -> int:
        """Advance by a choice of experts, and find all logits finite."""
        self._move("select_experts", **arrays)
        return _all_finite()

    def sort_rows(self, **arrays: Any) -> None:
        """Advance by sorting; give each expert the rows of a run, or its share of them."""
        self._move("sort_rows", **arrays)
        experts, counts = arrays["experts"], arrays["counts"]
        if self._routing is not None:
            counts[:] = next(self._routing)
        elif self._loads is None or len(self._loads) != len(counts):
            _spread_evenly(experts=experts, counts=counts)
        else:  # as near as whole rows come
            ends = np.cumsum(self._loads) / sum(self._loads) * experts.size
            counts[:] = np.diff(np.rint(ends).astype(np.int64), prepend=0)

    def _call(self, x: Array, n: int, moved: int, others: dict[str, Any]) -> Multiplied:
        groups = others["group_rows"]
        rows = (len(x),) if groups is None else tuple(groups.tolist())
        return Multiplied(
            rows, n, x.shape[1], others["activation"], False, moved, self._weight_bytes
        )

    def _product(self, m: int, n: int, k: int, moved: int) -> None:
        self._advance(self._costs.linears(Multiplied((m,), n, k, "none", False, moved, 0)))

    def _move(self, name: str, **arrays: Any) -> None:
        self._advance(self._costs.by_rows(name, *extent(name, arrays)))


class VirtualKernels(CoreKernels):
    """Shapes and workspaces of kernels, without their work.

    Args:
        isa: whose workspaces. threads: of each.
        arena: a dry one.
        trace: collects the time of each kernel.
        costs: what kernels take; None means no time.
        advance: lets the rank's clock go on.
        loads: rows of each expert, in any unit; None means even ones.
        routing: rows of each expert in each call of `sort_rows`, as a run had them, over and over;
            None goes by `loads`.
        accelerator: whose shapes and workspaces they are in place of the CPU's.
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
        routing: Sequence[NDArray[np.int64]] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        core: Any = _SHAPE_CORE
        if costs is not None:
            core = _TimedCore(costs, advance, loads, routing)
        elif accelerator is not None:
            core = _shape_core(accelerator.core)
        on = (
            _core.Execution(isa, threads=threads)
            if accelerator is None
            else accelerator.core.Execution("cuda", stream=accelerator.device.compute)
        )
        super().__init__(core=core, on=on, arena=arena, trace=trace)
        self.threads, self.cache_bytes = threads, cache_bytes(threads)
        self._uploads = accelerator is not None
        if self._uploads or (costs is not None and costs.takes_large_pieces):
            self.row_chunk = self.dispatch_rows = DEVICE_ROWS
            self.fuses_mlp = False
        elif costs is not None:
            self.piece_flops = PIECE_FLOPS

    def fill(self, out: Array, write: Callable[[Array], None]) -> None:
        """Leave the array as it is: it has no memory."""

    def read(self, array: Array) -> NDArray[Any]:
        """Return the array: it has no elements to copy."""
        return array

    def _settle(self, what: str) -> None:
        """Do nothing: there is nothing to wait for."""

    def _at_hand(self, index: Array | NDArray[np.int32]) -> Array:
        if self._uploads:
            self._arena.empty(index.shape, index.dtype, "workspaces")
        return index

    def _copy(self, source: Array, out: Array) -> None:
        self._core.copy(source=source, out=out)
