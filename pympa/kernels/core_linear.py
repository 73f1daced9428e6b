"""Linear layers and MLPs: the part of `CoreKernels` that multiplies by weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.kernels import Core, MlpWeights, PackedWeight, rows_at_once
from pympa.runtime.arena import Arena, Array
from pympa.runtime.trace import Trace

BLOCK = 512
"""The number of columns in a block of outputs: kColumnBlock of csrc/ops/linear_worker.hpp.

A product computes one block for all rows, then the next block.
"""
_ROW_BLOCK = 96  # kRowBlock there: fewer rows do not reach a core's full rate


class LinearKernels(ABC):
    """See `Kernels`; a base of `CoreKernels`, which sets the attributes."""

    threads: int
    cache_bytes: int
    """The cache bytes of all threads, for data that is reused while rows go through an MLP."""

    fuses_mlp: bool = True
    """Whether an MLP's hidden state exists only in blocks, given enough rows for all threads."""

    _arena: Arena
    _trace: Trace
    _core: Core
    _execution: dict[str, Any]
    _packing: dict[str, Any]

    @abstractmethod
    def _placed(self, out: Array, read: Callable[[Array], Array]) -> Array:
        """Return the rows that `read` returns, in memory that kernels can read; it may be `out`.

        `read` gets an array of the host of the shape and dtype of `out`.
        """

    def fill(self, out: Array, write: Callable[[Array], None]) -> None:
        """See `Kernels.fill`."""

        def read(host: Array) -> Array:
            write(host)
            return host

        self._placed(out, read)

    def pack(
        self,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        read: Callable[[int, int, Array], Array],
    ) -> PackedWeight:
        """See `Kernels.pack`."""
        group = self.pack_group(1, shape, dtype, lambda _, *piece: read(*piece))
        return PackedWeight(group.data[0], group.n, group.k)

    def pack_group(
        self,
        count: int,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        read: Callable[[int, int, int, Array], Array],
    ) -> PackedWeight:
        """See `Kernels.pack_group`."""
        n, k = shape
        data = self._arena.empty((count, self._packed_bytes(n, k, dtype)), np.uint8, "weights")
        with self._arena.scope():
            rows = self._arena.empty((min(rows_at_once(shape, dtype), n), k), dtype, "loading")
            for index, packed in enumerate(data):
                self._pack_rows(packed, n, rows, partial(read, index))
        return PackedWeight(data, n, k)

    def _pack_rows(
        self, packed: Array, n: int, rows: Array, read: Callable[[int, int, Array], Array]
    ) -> None:
        """Read and pack a weight of n rows, some at a time; `rows` has room for them."""
        at = 0
        for first in range(0, n, max(len(rows), 1)):
            last = min(first + len(rows), n)
            weight = self._placed(rows[: last - first], partial(read, first, last))
            size = self._packed_bytes(last - first, weight.shape[1], weight.dtype)
            self._core.pack_weight(weight=weight, packed=packed[at : at + size], **self._packing)
            at += size

    def _packed_bytes(self, n: int, k: int, dtype: np.dtype[Any]) -> int:
        size: int = self._core.packed_weight_bytes(n=n, k=k, dtype=str(dtype), **self._execution)
        return size

    def linear(
        self,
        x: Array,
        weight: PackedWeight,
        out: Array,
        *,
        bias: Array | None = None,
        activation: str = "none",
        residual: Array | None = None,
        branch: Array | None = None,
        group_rows: NDArray[np.int64] | None = None,
    ) -> None:
        """See `Kernels.linear`."""
        with self._trace.span("compute", "linear"), self._arena.scope():
            self._record_weights(x, min(BLOCK, weight.n), weight.k)
            self._core.linear(
                x=x,
                packed=weight.data,
                out=out,
                bias=bias,
                activation=activation,
                residual=residual,
                branch=branch,
                group_rows=group_rows,
                workspace=self._linear_workspace(x, weight, gated=False),
                **self._execution,
            )

    def mlp(
        self,
        x: Array,
        weights: MlpWeights,
        out: Array,
        *,
        bias: Array | None = None,
        residual: Array | None = None,
        branch: Array | None = None,
        group_rows: NDArray[np.int64] | None = None,
    ) -> None:
        """See `Kernels.mlp`."""
        others: dict[str, Any] = {
            "bias": bias,
            "residual": residual,
            "branch": branch,
            "group_rows": group_rows,
        }
        if self.fuses_mlp and (self.threads == 1 or len(x) >= self.threads * _ROW_BLOCK):
            self._fused_mlp(x, weights, out, **others)
            return
        with self._arena.scope():
            hidden = self._arena.empty((len(x), weights.up.n), x.dtype)
            self._hidden_state(x, weights, hidden, group_rows)
            self.linear(hidden, weights.down, out, **others)

    def _fused_mlp(self, x: Array, weights: MlpWeights, out: Array, **others: Any) -> None:
        up, down, gated = weights.up, weights.down, weights.gate is not None
        item_rows = self._rows_of_a_pass(x, weights)
        with self._trace.span("compute", "mlp"), self._arena.scope():
            self._record_weights(x, min(BLOCK, up.n), (2 if gated else 1) * up.k + down.n)
            size = self._core.mlp_workspace_bytes(
                item_rows=item_rows,
                hidden=up.n,
                n=down.n,
                dtype=str(x.dtype),
                gated=gated,
                **self._execution,
            )
            self._core.mlp(
                x=x,
                packed_gate=None if weights.gate is None else weights.gate.data,
                packed_up=up.data,
                packed_down=down.data,
                out=out,
                bias_gate=weights.gate_bias,
                bias_up=weights.up_bias,
                activation=weights.activation,
                limit=weights.limit,
                alpha=weights.alpha,
                hidden=up.n,
                item_rows=item_rows,
                workspace=self._arena.empty((size,), np.uint8, "workspaces"),
                **others,
                **self._execution,
            )

    def _rows_of_a_pass(self, x: Array, weights: MlpWeights) -> int:
        """Return the number of rows for which a thread reads the weights once.

        As many rows as fit the cache with their sums and inputs, beside the weights of a block of
        hidden columns, but few enough that all threads have work.
        """
        up, down = weights.up, weights.down
        matrices = (1 if weights.gate is None else 2) * up.k + down.n
        row = np.dtype(np.float32).itemsize * down.n + x.itemsize * up.k
        fitting = (self.cache_bytes - BLOCK * matrices * x.itemsize) // (row * self.threads)
        whole_blocks = max(1, fitting // _ROW_BLOCK) * _ROW_BLOCK
        return max(1, min(whole_blocks, -(-len(x) // self.threads)))

    def _hidden_state(
        self, x: Array, weights: MlpWeights, out: Array, group_rows: NDArray[np.int64] | None
    ) -> None:
        if weights.gate is None:
            activation, bias = weights.activation, weights.up_bias
            self.linear(x, weights.up, out, bias=bias, activation=activation, group_rows=group_rows)
            return
        with self._trace.span("compute", "gated_linear"), self._arena.scope():
            self._record_weights(x, min(BLOCK, weights.up.n), 2 * weights.up.k)
            self._core.gated_linear(
                x=x,
                packed_gate=weights.gate.data,
                packed_up=weights.up.data,
                out=out,
                bias_gate=weights.gate_bias,
                bias_up=weights.up_bias,
                activation=weights.activation,
                limit=weights.limit,
                alpha=weights.alpha,
                group_rows=group_rows,
                workspace=self._linear_workspace(x, weights.up, gated=True),
                **self._execution,
            )

    def _linear_workspace(self, x: Array, weight: PackedWeight, *, gated: bool) -> Array:
        size = self._core.linear_workspace_bytes(
            m=x.shape[0], n=weight.n, k=weight.k, dtype=str(x.dtype), gated=gated, **self._execution
        )
        return self._arena.empty((size,), np.uint8, "workspaces")

    def _record_weights(self, x: Array, columns: int, length: int) -> None:
        """Record the part of the weights that all rows use together, if there is a ledger.

        That part should stay in the cache while the rows go through it.
        """
        if self._arena.ledger is not None and len(x):
            size = self._core.packed_weight_bytes(
                n=columns, k=length, dtype=str(x.dtype), **self._execution
            )
            self._arena.ledger.read(size)
