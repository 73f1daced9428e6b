"""Kernels on the CPU: `pympa._core`, with workspaces from the arena and spans in the trace."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pympa import _core
from pympa.arena import Arena, Array
from pympa.caches import cache_of_rank
from pympa.kernels import Core
from pympa.kernels.cpu_attention import AttentionKernels
from pympa.kernels.cpu_linear import LinearKernels
from pympa.kernels.cpu_routing import RoutingKernels
from pympa.trace import Trace
from pympa.volume import DISPATCH_ROWS

PIECE_FLOPS = 1.5e9  # 5 ms at 300 GFLOP/s, what one core does in attention

_CACHE_BYTES = 2 << 20  # of a core, where the system does not tell


def supported_isas() -> list[str]:
    """Return the instruction sets this CPU runs, best first."""
    return _core.supported_isas()


class CpuKernels(LinearKernels, AttentionKernels, RoutingKernels):
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

    def __init__(
        self, *, isa: str, threads: int, arena: Arena, trace: Trace, core: Core = _core
    ) -> None:
        self.isa = isa
        self.threads = threads
        self.cache_bytes = cache_of_rank(threads) or threads * _CACHE_BYTES
        self._arena = arena
        self._trace = trace
        self._core = core
        self._how = {"threads": threads, "isa": isa}

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
            self._copy(source, out)

    def add(self, a: Array, b: Array, out: Array) -> None:
        """See `Kernels.add`."""
        with self._trace.span("compute", "add"):
            self._core.add(a=a, b=b, out=out, **self._how)

    def sum_partials(self, parts: Array, bias: Array | None, out: Array) -> None:
        """See `Kernels.sum_partials`."""
        with self._trace.span("compute", "sum_partials"):
            self._core.sum_partials(parts=parts, bias=bias, out=out, **self._how)

    def _copy(self, source: Array, out: Array) -> None:
        np.copyto(out, source)
