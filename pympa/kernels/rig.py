"""Kernels with their own memory, and arrays, weights and states for single calls.

Calibration, the kernel benchmark and the measurement of peaks use it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pympa.kernels import Kernels, PackedWeight, State
from pympa.kernels.cpu import CpuKernels
from pympa.kernels.cuda import Accelerator, CudaKernels
from pympa.runtime.arena import Arena, Array
from pympa.runtime.trace import Trace

_SMALL_NUMBER_BYTE = 0x3C  # repeated, it is a small number in each floating-point dtype


class Rig:
    """Kernels of a CPU or a GPU, an arena and a trace.

    Args:
        dtype: the dtype of the arrays.
        isa: the instruction set of the CPU; without effect on a GPU.
        threads: the number of threads of each kernel.
        accelerator: the GPU; None means the CPU.
    """

    def __init__(
        self,
        dtype: np.dtype[Any],
        *,
        isa: str = "",
        threads: int = 1,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.dtype, self.trace = dtype, Trace()
        self.kernels: Kernels
        if accelerator is None:
            self.arena = Arena()
            self.kernels = CpuKernels(isa=isa, threads=threads, arena=self.arena, trace=self.trace)
        else:
            self.arena = Arena(device=accelerator.device)
            self.kernels = CudaKernels(accelerator=accelerator, arena=self.arena, trace=self.trace)
        self._rng = np.random.default_rng(0)

    def empty(self, *shape: int) -> Array:
        """Return an uninitialised array of the dtype."""
        return self.arena.empty(shape, self.dtype)

    def filled(self, *shape: int) -> Array:
        """Return an array of one small number, on a CPU."""
        array = self.empty(*shape)
        self.fill(array)
        return array

    def fill(self, array: Array) -> None:
        """Fill an array of the host with a small number, for any floating-point dtype."""
        array.reshape(-1).view(np.uint8)[...] = _SMALL_NUMBER_BYTE

    def normal(self, *shape: int) -> Array:
        """Return standard normal numbers, rounded to the dtype, on a CPU."""
        array = self.empty(*shape)
        array[...] = self._rng.standard_normal(shape, np.float32)
        return array

    def weight(self, n: int, k: int) -> tuple[Array, PackedWeight]:
        """Return a weight `[n, k]` that keeps the variance of its input, and its packed copy."""
        weight = self.normal(n, k)
        weight *= self.dtype.type(k**-0.5)
        return weight, self.kernels.pack((n, k), self.dtype, lambda a, b, _: weight[a:b])

    def weights(self, count: int, n: int, k: int) -> tuple[Array, PackedWeight]:
        """Return a group of such weights `[count, n, k]`, and its packed copy."""
        weights = self.normal(count, n, k)
        weights *= self.dtype.type(k**-0.5)
        packed = self.kernels.pack_group(
            count, (n, k), self.dtype, lambda index, a, b, _: weights[index, a:b]
        )
        return weights, packed

    def filled_weight(self, n: int, k: int) -> PackedWeight:
        """Return a packed weight `[n, k]` of one small number."""

        def read(_first: int, _last: int, out: Array) -> Array:
            self.fill(out)
            return out

        return self.kernels.pack((n, k), self.dtype, read)

    def state(self, rows: int, v_head_dim: int, heads: int = 1) -> State:
        """Return a state as after one key, on a CPU."""
        shapes = (rows, heads), (rows, heads), (rows, heads, max(1, v_head_dim))
        state = State(*(self.arena.empty(shape, np.float32) for shape in shapes))
        for array in state:
            array.fill(1.0)
        return state
