"""Kernels of a compiled module, with workspaces from the arena and spans in the trace.

`pympa._core` holds the CPU's and `pympa._cuda` the GPU's: the same functions with the same
arguments. What differs is how arrays get from and to the host.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Arena, Array
from pympa.kernels import Core
from pympa.kernels.core_attention import AttentionKernels
from pympa.kernels.core_linear import LinearKernels
from pympa.kernels.core_routing import RoutingKernels
from pympa.trace import Trace
from pympa.volume import DISPATCH_ROWS


class CoreKernels(LinearKernels, AttentionKernels, RoutingKernels):
    """See `Kernels`; what all backends share.

    Args:
        core: a compiled module, or shape-only stand-ins (`pympa.kernels.virtual`).
        on: the module's `Execution`: what its kernels run on.
        arena: where workspaces and packed weights come from.
        trace: collects the time of each kernel.
    """

    row_chunk: int = 1024
    dispatch_rows: int = DISPATCH_ROWS

    def __init__(self, *, core: Core, on: Any, arena: Arena, trace: Trace) -> None:
        self._arena = arena
        self._trace = trace
        self._core = core
        self._how = {"on": on}

    @abstractmethod
    def read(self, array: Array) -> NDArray[Any]:
        """See `Kernels.read`."""

    @abstractmethod
    def _at_hand(self, index: Array | NDArray[np.int32]) -> Array:
        """Return an index, which may be on the host, where kernels can read it."""

    @abstractmethod
    def _copy(self, source: Array, out: Array) -> None:
        """Copy between arrays alike in shape and dtype."""

    def rope(self, x: Array, cos: Array, sin: Array, index: NDArray[np.int32]) -> None:
        """See `Kernels.rope`."""
        with self._trace.span("compute", "rope"), self._arena.scope():
            self._core.rope(x=x, cos=cos, sin=sin, index=self._at_hand(index), **self._how)

    def norm(
        self, x: Array, weight: Array, bias: Array | None, out: Array, *, eps: float, kind: str
    ) -> None:
        """See `Kernels.norm`."""
        with self._trace.span("compute", "norm"):
            self._core.norm(x=x, weight=weight, bias=bias, eps=eps, kind=kind, out=out, **self._how)

    def gather_rows(
        self, source: Array, index: Array | NDArray[np.int32], out: Array, *, first_row: int = 0
    ) -> None:
        """See `Kernels.gather_rows`."""
        with self._trace.span("compute", "gather_rows"), self._arena.scope():
            self._core.gather_rows(
                source=source,
                index=self._at_hand(index),
                out=out,
                first_row=first_row,
                **self._how,
            )

    def copy(self, source: Array, out: Array) -> None:
        """See `Kernels.copy`."""
        if source.shape != out.shape or source.dtype != out.dtype:
            raise ValueError(
                f"copy: out: expected {source.dtype} {list(source.shape)}, "
                f"got {out.dtype} {list(out.shape)}"
            )
        with self._trace.span("compute", "copy"):
            self._copy(source, out)

    def add(self, a: Array, b: Array, out: Array) -> None:
        """See `Kernels.add`."""
        with self._trace.span("compute", "add"):
            self._core.add(a=a, b=b, out=out, **self._how)

    def sum_partials(self, parts: Array, bias: Array | None, out: Array) -> None:
        """See `Kernels.sum_partials`."""
        with self._trace.span("compute", "sum_partials"):
            self._core.sum_partials(parts=parts, bias=bias, out=out, **self._how)
