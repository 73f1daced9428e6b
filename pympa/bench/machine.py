"""What one core can do at best: the yardstick of every roofline (Williams et al. 2009)."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from pympa import _core

# Short tries: where other work takes the core every few ms, one of them is left alone.
_FMA_TRIES, _FMA_SECONDS = 50, 4e-3
_BANDWIDTH_TRIES, _BANDWIDTH_SECONDS = 5, 0.04
_BANDWIDTH_BYTES = 256 << 20


@dataclass(frozen=True)
class Machine:
    """Multiply-adds in registers, flop/s, and reads of a large buffer, bytes/s."""

    flops_per_second: float
    bytes_per_second: float


def measure_core(dtype: str, isa: str) -> Machine:
    """Measure one core: the best of many short tries."""
    flops = [_core.fma_peak(dtype, isa, _FMA_SECONDS) for _ in range(_FMA_TRIES)]
    read = (_BANDWIDTH_BYTES, _BANDWIDTH_SECONDS)
    reads = [_core.read_bandwidth(*read) for _ in range(_BANDWIDTH_TRIES)]
    return Machine(max(flops), max(reads))


def processor_name() -> str:
    """Return what the processor calls itself, where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
