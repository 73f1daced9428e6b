"""Kernels of a compiled module, with workspaces from the arena and spans in the trace.

`pympa._core` has the kernels of the CPU and `pympa._cuda` those of the GPU: the same functions with
the same arguments. They differ in how arrays are copied from and to the host.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.kernels import Core
from pympa.kernels.core_attention import AttentionKernels
from pympa.kernels.core_linear import LinearKernels
from pympa.kernels.core_routing import RoutingKernels
from pympa.runtime.arena import Arena, Array
from pympa.runtime.trace import Trace


class CoreKernels(LinearKernels, AttentionKernels, RoutingKernels):
    """See `Kernels`; the code that all backends share.

    Args:
        core: a compiled module, or replacements that use only shapes (`pympa.kernels.virtual`).
        on: the module's `Execution` for its kernels.
        arena: the arena for workspaces and packed weights.
        trace: the trace of the time of each kernel.
    """

    row_chunk: int = 1024
    dispatch_rows: int = 512

    def __init__(self, *, core: Core, on: Any, arena: Arena, trace: Trace) -> None:
        self._arena = arena
        self._trace = trace
        self._core = core
        self._execution = self._packing = {"on": on}

    @abstractmethod
    def read(self, array: Array) -> NDArray[Any]:
        """See `Kernels.read`."""

    @abstractmethod
    def _to_device(self, index: Array | NDArray[np.int32]) -> Array:
        """Return an index, which may be on the host, in memory that kernels can read."""

    @abstractmethod
    def _copy(self, source: Array, out: Array) -> None:
        """Copy between arrays of the same shape and dtype."""

    def rope(
        self,
        x: Array,
        cos: Array,
        sin: Array,
        index: NDArray[np.int32],
        *,
        interleaved: bool = False,
    ) -> None:
        """See `Kernels.rope`."""
        with self._trace.span("compute", "rope"), self._arena.scope():
            self._core.rope(
                x=x,
                cos=cos,
                sin=sin,
                index=self._to_device(index),
                interleaved=interleaved,
                **self._execution,
            )

    def norm(
        self,
        x: Array,
        weight: Array,
        bias: Array | None,
        out: Array,
        *,
        eps: float,
        kind: str,
        offset: float = 0.0,
        squares: Array | None = None,
        width: int = 0,
    ) -> None:
        """See `Kernels.norm`."""
        with self._trace.span("compute", "norm"):
            self._core.norm(
                x=x,
                weight=weight,
                bias=bias,
                eps=eps,
                kind=kind,
                offset=offset,
                squares=squares,
                width=width,
                out=out,
                **self._execution,
            )

    def sum_squares(self, x: Array, out: Array) -> None:
        """See `Kernels.sum_squares`."""
        with self._trace.span("compute", "sum_squares"):
            self._core.sum_squares(x=x, out=out, **self._execution)

    def softcap(self, x: Array, cap: float) -> None:
        """See `Kernels.softcap`."""
        with self._trace.span("compute", "softcap"):
            self._core.softcap(x=x, cap=cap, **self._execution)

    def gather_rows(
        self, source: Array, index: Array | NDArray[np.int32], out: Array, *, first_row: int = 0
    ) -> None:
        """See `Kernels.gather_rows`."""
        with self._trace.span("compute", "gather_rows"), self._arena.scope():
            self._core.gather_rows(
                source=source,
                index=self._to_device(index),
                out=out,
                first_row=first_row,
                **self._execution,
            )

    def copy(self, source: Array, out: Array) -> None:
        """See `Kernels.copy`."""
        shapes = zip(source.shape, out.shape, strict=False)
        fits = source.ndim == out.ndim and all(have in (1, want) for have, want in shapes)
        if not fits or source.dtype != out.dtype:
            raise ValueError(
                f"copy: out: expected {source.dtype} {list(source.shape)}; "
                f"got {out.dtype} {list(out.shape)}"
            )
        with self._trace.span("compute", "copy"):
            self._copy(source, out)

    def add(self, a: Array, b: Array, out: Array) -> None:
        """See `Kernels.add`."""
        with self._trace.span("compute", "add"):
            self._core.add(a=a, b=b, out=out, **self._execution)

    def sum_partials(self, parts: Array, bias: Array | None, out: Array) -> None:
        """See `Kernels.sum_partials`."""
        with self._trace.span("compute", "sum_partials"):
            self._core.sum_partials(parts=parts, bias=bias, out=out, **self._execution)
