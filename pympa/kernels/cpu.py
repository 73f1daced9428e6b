"""Kernels on the CPU: `pympa._core`, with workspaces from the arena and spans in the trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa import _core
from pympa.arena import Arena, Array
from pympa.kernels import Core, PackedWeight
from pympa.kernels.cpu_attention import AttentionKernels
from pympa.kernels.cpu_routing import RoutingKernels
from pympa.trace import Trace
from pympa.volume import DISPATCH_ROWS

PIECE_FLOPS = 1.5e9  # 5 ms at 300 GFLOP/s, what one core does in attention


def supported_isas() -> list[str]:
    """Return the instruction sets this CPU runs, best first."""
    return _core.supported_isas()


class CpuKernels(AttentionKernels, RoutingKernels):
    """See `Kernels`.

    Args:
        isa: instruction set, one that every rank supports.
        threads: OpenMP threads of a call.
        arena: where workspaces and packed weights come from.
        trace: collects the time of each kernel.
        core: `pympa._core`, or shape-only stand-ins (`pympa.kernels.virtual`).
    """

    piece_flops: float = PIECE_FLOPS
    row_chunk: int = 1024
    dispatch_rows: int = DISPATCH_ROWS
    leaves_out_alike: bool = False

    def __init__(
        self, *, isa: str, threads: int, arena: Arena, trace: Trace, core: Core = _core
    ) -> None:
        self.isa = isa
        self.threads = threads
        self._arena = arena
        self._trace = trace
        self._core = core
        self._how = {"threads": threads, "isa": isa}

    def pack(
        self, shape: tuple[int, int], dtype: np.dtype[Any], fill: Callable[[Array], None]
    ) -> PackedWeight:
        """See `Kernels.pack`."""
        group = self.pack_group(1, shape, dtype, lambda _, weight: fill(weight))
        return PackedWeight(group.data[0], group.n, group.k)

    def pack_group(
        self,
        count: int,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        fill: Callable[[int, Array], None],
    ) -> PackedWeight:
        """See `Kernels.pack_group`."""
        n, k = shape
        size = self._core.packed_weight_bytes(n=n, k=k, dtype=str(dtype), isa=self.isa)
        data = self._arena.empty((count, size), np.uint8, "weights")
        with self._arena.scope():
            weight = self._arena.empty(shape, dtype, "loading")
            for index, packed in enumerate(data):
                if not self._arena.dry:
                    fill(index, weight)
                self._core.pack_weight(weight=weight, packed=packed, isa=self.isa)
        return PackedWeight(data, n, k)

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
                **self._how,
            )

    def gated_linear(
        self,
        x: Array,
        gate: PackedWeight,
        up: PackedWeight,
        out: Array,
        *,
        activation: str,
        gate_bias: Array | None = None,
        up_bias: Array | None = None,
        group_rows: NDArray[np.int64] | None = None,
    ) -> None:
        """See `Kernels.gated_linear`."""
        with self._trace.span("compute", "gated_linear"), self._arena.scope():
            self._core.gated_linear(
                x=x,
                packed_gate=gate.data,
                packed_up=up.data,
                out=out,
                bias_gate=gate_bias,
                bias_up=up_bias,
                activation=activation,
                group_rows=group_rows,
                workspace=self._linear_workspace(x, up, gated=True),
                **self._how,
            )

    def rope(self, x: Array, cos: Array, sin: Array, index: NDArray[np.int32]) -> None:
        """See `Kernels.rope`."""
        with self._trace.span("compute", "rope"):
            self._core.rope(x=x, cos=cos, sin=sin, index=index, **self._how)

    def norm(
        self, x: Array, weight: Array, bias: Array | None, out: Array, *, eps: float, kind: str
    ) -> None:
        """See `Kernels.norm`."""
        with self._trace.span("compute", "norm"):
            self._core.norm(x=x, weight=weight, bias=bias, eps=eps, kind=kind, out=out, **self._how)

    def gather_rows(
        self, source: Array, index: NDArray[np.int32], out: Array, *, first_row: int = 0
    ) -> None:
        """See `Kernels.gather_rows`."""
        with self._trace.span("compute", "gather_rows"):
            self._core.gather_rows(
                source=source, index=index, out=out, first_row=first_row, **self._how
            )

    def copy(self, source: Array, out: Array) -> None:
        """See `Kernels.copy`."""
        if source.shape != out.shape or source.dtype != out.dtype:
            raise ValueError(
                f"copy: out: expected {source.dtype} {list(source.shape)}, "
                f"got {out.dtype} {list(out.shape)}"
            )
        with self._trace.span("compute", "copy"):
            if not self._arena.dry:
                np.copyto(out, source)

    def add(self, a: Array, b: Array, out: Array) -> None:
        """See `Kernels.add`."""
        with self._trace.span("compute", "add"):
            self._core.add(a=a, b=b, out=out, **self._how)

    def sum_partials(self, parts: Array, bias: Array | None, out: Array) -> None:
        """See `Kernels.sum_partials`."""
        with self._trace.span("compute", "sum_partials"):
            self._core.sum_partials(parts=parts, bias=bias, out=out, **self._how)

    def _linear_workspace(self, x: Array, weight: PackedWeight, *, gated: bool) -> Array:
        size = self._core.linear_workspace_bytes(
            m=x.shape[0], n=weight.n, k=weight.k, dtype=str(x.dtype), gated=gated, **self._how
        )
        return self._arena.empty((size,), np.uint8, "workspaces")
