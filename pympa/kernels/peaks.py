"""The peak rates of one core or GPU, for every roofline (Williams et al. 2009)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import pympa._core as _core
from pympa.kernels.cuda import Accelerator
from pympa.kernels.rig import Rig
from pympa.runtime.arena import Array

# Short tries: even if other work interrupts the core every few ms, some try is undisturbed.
_FMA_TRIES, _FMA_SECONDS = 50, 4e-3
_BANDWIDTH_TRIES, _BANDWIDTH_SECONDS = 5, 0.04
_BANDWIDTH_BYTES = 256 << 20
_DEVICE_TRIES = 10
_DEVICE_PRODUCT = 8192  # rows, columns and terms
_DEVICE_NUMBERS = 1_000_003  # random numbers that are repeated in it
_DEVICE_COPY = (32768, 8192)  # float32: 1 GiB, many times the cache


@dataclass(frozen=True)
class Machine:
    """Products in registers, flop/s, and reads of a large buffer, bytes/s.

    For a GPU: the flop/s of a large product, and the bytes/s read and written by a copy.

    Attributes:
        flops_per_second: the rate of the fastest instruction that the dtype may use.
        bytes_per_second: the rate of reading.
        instructions: the rates of all instructions of a CPU that the dtype may use, by the
            instruction set that has them.
    """

    flops_per_second: float
    bytes_per_second: float
    instructions: dict[str, float] = field(default_factory=dict)


def peak_flops(dtype: str, isa: str) -> float:
    """Measure the products of one core in registers: the best of many short tries, flop/s."""
    return max(_core.product_peak(dtype, isa, _FMA_SECONDS) for _ in range(_FMA_TRIES))


def measure_core(dtype: str, isa: str) -> Machine:
    """Measure one core: the best of many short tries.

    Beside matrix tiles (AMX) there are always the multiply-adds of AVX-512.
    """
    isas = ("amx_bf16", "avx512") if isa == "amx_bf16" else (isa,)
    flops = {name: peak_flops(dtype, name) for name in isas}
    read = _core.read_bandwidth(_BANDWIDTH_BYTES, _BANDWIDTH_SECONDS, _BANDWIDTH_TRIES)
    return Machine(max(flops.values()), read, flops)


def measure_device(accelerator: Accelerator, dtype: np.dtype[Any]) -> Machine:
    """Measure one GPU by a product of its library and a copy: the best of some tries."""
    device, n = accelerator.device, _DEVICE_PRODUCT
    rig = Rig(dtype, accelerator=accelerator)
    arena, kernels = rig.arena, rig.kernels
    numbers = np.random.default_rng(0).standard_normal(_DEVICE_NUMBERS, np.float32)

    def fill(out: Array) -> None:
        out[:] = np.resize(numbers, out.shape)

    weight = kernels.pack(
        (n, n), dtype, lambda a, b, _: np.resize(numbers, (b - a, n)).astype(dtype)
    )
    x, out = arena.empty((n, n), dtype), arena.empty((n, n), dtype)
    kernels.fill(x, fill)
    source, target = (arena.empty(_DEVICE_COPY, np.float32) for _ in range(2))

    def seconds(work: Callable[[], None]) -> float:
        start, stop = (device.event(timed=True) for _ in range(2))
        taken = []
        for _ in range(_DEVICE_TRIES):
            device.record(start, device.compute)
            work()
            device.record(stop, device.compute)
            device.finish(stop, "a measurement of the device")
            taken.append(device.seconds(start, stop))
        return min(taken[1:])

    product = seconds(lambda: kernels.linear(x, weight, out))
    copied = seconds(lambda: kernels.copy(source, target))
    moved = source.nbytes + target.nbytes
    arena.close()
    return Machine(2 * n**3 / product, moved / copied)
