"""Kernels on shapes: sizes are computed, numbers are not.

On a dry arena the strategies make the same allocations and messages as in a real run, without
memory or time. So they show the memory and messages of a rank in advance. With costs, kernels also
advance a virtual clock, which gives the times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import pympa._core as _core
from pympa.costs.calls import AttentionCall, GemmCall
from pympa.kernels import Core
from pympa.kernels.core import CoreKernels
from pympa.kernels.cpu import PIECE_FLOPS, cache_bytes
from pympa.kernels.cuda import DEVICE_ROWS, Accelerator
from pympa.kernels.ops import OPS, extent, nbytes
from pympa.runtime.arena import Arena, Array
from pympa.runtime.trace import Trace

if TYPE_CHECKING:
    from pympa.costs.device_costs import Costs

_SIZES = (
    "packed_weight_bytes",
    "linear_workspace_bytes",
    "mlp_workspace_bytes",
    "attention_workspace_bytes",
    "range_workspace_bytes",
)


def _nothing(**_: Any) -> None:
    """Replace a kernel by nothing."""


def _all_finite(**_: Any) -> int:
    """Replace `select_experts`: all logits are finite."""
    return -1


def _spread_evenly(*, experts: Array, counts: NDArray[np.int64], **_: Any) -> None:
    """Replace `sort_rows`: all experts get an equal number of rows."""
    counts[:] = (experts.size + np.arange(len(counts))[::-1]) // len(counts)


_RETURNING = {"select_experts": _all_finite, "sort_rows": _spread_evenly}
"""The replacements of kernels whose results the host reads."""


def _shape_core(sizes: Core) -> Core:
    """Return replacements that do nothing and take no time."""
    return SimpleNamespace(
        **{name: getattr(sizes, name) for name in _SIZES if hasattr(sizes, name)},
        **(dict.fromkeys((op.name for op in OPS), _nothing) | _RETURNING),
    )


_SHAPE_CORE = _shape_core(_core)


class _TimedCore:
    """Replacements of kernels that advance a clock by the time on a device."""

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
        """Return a size function of the CPU's kernels, or a kernel that moves its arrays."""
        if name in _SIZES:
            size: Callable[..., Any] = getattr(_core, name)
            return size
        return partial(self._move, name)

    def pack_weight(self, *, packed: Array, **_: Any) -> None:
        """Count the bytes of a weight; loading is not part of a step."""
        self._weight_bytes += packed.nbytes

    def linear(self, *, x: Array, packed: Array, out: Array, **others: Any) -> None:
        """Advance by a product, or by one for each group of rows."""
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
        """Advance by attention over the pairs that the mask admits."""
        ranges = others["q_ranges"].tobytes(), others["k_ranges"][:, :3].tobytes()
        heads = q.shape[1], k.shape[1], q.shape[2], v.shape[2]
        keys = int(others["k_ranges"][:, 2].sum())  # arrays may have more, which are not read
        moved = nbytes(q) + keys * (nbytes(k, v) // max(len(k), 1)) + 2 * out.nbytes
        self._advance(
            self._costs.attend(AttentionCall(*ranges, causal, window or None, *heads, moved))
        )

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
        """Advance by a choice of experts; all logits are finite."""
        self._move("select_experts", **arrays)
        return _all_finite()

    def sort_rows(self, **arrays: Any) -> None:
        """Advance by a sort; the number of rows of each expert is that of a run, or by its load."""
        self._move("sort_rows", **arrays)
        experts, counts = arrays["experts"], arrays["counts"]
        if self._routing is not None:
            counts[:] = next(self._routing)
        elif self._loads is None or len(self._loads) != len(counts):
            _spread_evenly(experts=experts, counts=counts)
        else:  # rounded to whole rows
            ends = np.cumsum(self._loads) / sum(self._loads) * experts.size
            counts[:] = np.diff(np.rint(ends).astype(np.int64), prepend=0)

    def _call(self, x: Array, n: int, moved: int, others: dict[str, Any]) -> GemmCall:
        groups = others["group_rows"]
        rows = (len(x),) if groups is None else tuple(groups.tolist())
        return GemmCall(rows, n, x.shape[1], others["activation"], False, moved, self._weight_bytes)

    def _product(self, m: int, n: int, k: int, moved: int) -> None:
        self._advance(self._costs.linears(GemmCall((m,), n, k, "none", False, moved, 0)))

    def _move(self, name: str, **arrays: Any) -> None:
        self._advance(self._costs.by_rows(name, *extent(name, arrays)))


class VirtualKernels(CoreKernels):
    """Kernels that compute shapes and workspaces without working on numbers.

    Args:
        isa: the instruction set whose workspaces are counted.
        threads: the number of threads of each kernel.
        arena: a dry arena.
        trace: the trace of the time of each kernel.
        costs: the seconds of kernels; None means no time.
        advance: a function that advances the rank's clock.
        loads: the rows of each expert, in any unit; None means even loads.
        routing: the rows of each expert in each call of `sort_rows`, as in a run, repeated; None
            uses `loads`.
        accelerator: the GPU whose shapes and workspaces are counted; None means the CPU.
    """

    piece_flops = math.inf  # messages progress without polling, so attention is not cut

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

    def _placed(self, out: Array, read: Callable[[Array], Array]) -> Array:
        """Do nothing: the array has no memory."""
        return out

    def _pack_rows(
        self, packed: Array, n: int, rows: Array, read: Callable[[int, int, Array], Array]
    ) -> None:
        self._core.pack_weight(packed=packed)

    def read(self, array: Array) -> NDArray[Any]:
        """Return the array, which has no elements to copy."""
        return array

    def _synchronize(self, what: str) -> None:
        """Do nothing: there is nothing to wait for."""

    def _to_device(self, index: Array | NDArray[np.int32]) -> Array:
        if self._uploads:
            self._arena.empty(index.shape, index.dtype, "workspaces")
        return index

    def _copy(self, source: Array, out: Array) -> None:
        self._core.copy(source=source, out=out)
