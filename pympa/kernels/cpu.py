"""Kernels on the CPU: `pympa._core`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa import _core
from pympa.arena import Arena, Array
from pympa.caches import cache_of_rank
from pympa.kernels.core import CoreKernels
from pympa.trace import Trace

PIECE_FLOPS = 1.5e9  # 5 ms at 300 GFLOP/s, what one core does in attention

_CACHE_BYTES = 2 << 20  # of a core, where the system does not tell


def supported_isas() -> list[str]:
    """Return the instruction sets this CPU runs, best first."""
    return _core.supported_isas()


def cache_bytes(threads: int) -> int:
    """Return the bytes of cache that the threads of a rank may call their own."""
    return cache_of_rank(threads) or threads * _CACHE_BYTES


class CpuKernels(CoreKernels):
    """See `Kernels`.

    Args:
        isa: instruction set, one that every rank supports.
        threads: OpenMP threads of a call.
        arena: where workspaces and packed weights come from.
        trace: collects the time of each kernel.
    """

    piece_flops: float = PIECE_FLOPS

    def __init__(self, *, isa: str, threads: int, arena: Arena, trace: Trace) -> None:
        on = _core.Execution(isa, threads=threads)
        super().__init__(core=_core, on=on, arena=arena, trace=trace)
        self.threads = threads
        self.cache_bytes = cache_bytes(threads)

    def fill(self, out: Array, write: Callable[[Array], None]) -> None:
        """See `Kernels.fill`."""
        write(out)

    def read(self, array: Array) -> NDArray[Any]:
        """See `Kernels.read`."""
        return array.copy()

    def _settle(self, what: str) -> None:
        """Do nothing: kernels are done when they return."""

    def _at_hand(self, index: Array | NDArray[np.int32]) -> Array:
        return index

    def _copy(self, source: Array, out: Array) -> None:
        np.copyto(out, source)
