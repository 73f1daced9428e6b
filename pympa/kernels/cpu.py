"""Kernels on the CPU: `pympa._core`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pympa._core as _core
from pympa.hardware.caches import cache_of_rank
from pympa.kernels.core import CoreKernels
from pympa.runtime.arena import Arena, Array
from pympa.runtime.trace import Trace

PIECE_FLOPS = 1.5e9  # 5 ms at 300 GFLOP/s, the rate of attention on one core

_CACHE_BYTES = 2 << 20  # of a core, if the system does not report it


def supported_isas() -> list[str]:
    """Return the instruction sets that this CPU runs, best first."""
    return _core.supported_isas()


def why_no_tiles() -> str:
    """Return why the matrix tiles (AMX) of this processor are not used; empty if it has none."""
    return _core.why_no_tiles()


def isa_of_profile(isa: str | None) -> str:
    """Return the instruction set whose workspaces a simulation counts, for one of another machine.

    Args:
        isa: the one of a measured profile; None means that of this machine. Where this machine
            lacks it, sizes are those of the model of it, if there is one, or of the best one here.
    """
    here = supported_isas()
    wanted = (isa, "amx_emulated") if isa == "amx_bf16" else (isa,)
    return next((name for name in wanted if name in here), here[0])


def cache_bytes(threads: int) -> int:
    """Return the cache bytes of the threads of a rank."""
    return cache_of_rank(threads) or threads * _CACHE_BYTES


class CpuKernels(CoreKernels):
    """See `Kernels`.

    Args:
        isa: the instruction set, which every rank must support.
        threads: the number of OpenMP threads of a call.
        arena: the arena for workspaces and packed weights.
        trace: the trace of the time of each kernel.
        packing_threads: the number of threads that pack a weight; None means `threads`.
    """

    piece_flops: float = PIECE_FLOPS

    def __init__(
        self,
        *,
        isa: str,
        threads: int,
        arena: Arena,
        trace: Trace,
        packing_threads: int | None = None,
    ) -> None:
        on = _core.Execution(isa, threads=threads)
        super().__init__(core=_core, on=on, arena=arena, trace=trace)
        if packing_threads is not None:
            self._packing = {"on": _core.Execution(isa, threads=packing_threads)}
        self.threads = threads
        self.cache_bytes = cache_bytes(threads)

    def _placed(self, out: Array, read: Callable[[Array], Array]) -> Array:
        return read(out)

    def read(self, array: Array) -> NDArray[Any]:
        """See `Kernels.read`."""
        return array.copy()

    def _synchronize(self, what: str) -> None:
        """Do nothing: kernels are done when they return."""

    def _to_device(self, index: Array | NDArray[np.int32]) -> Array:
        return index

    def _copy(self, source: Array, out: Array) -> None:
        np.copyto(out, source)
