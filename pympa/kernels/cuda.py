"""Kernels on a GPU: `pympa._cuda`, on the device's stream of kernels."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.errors import RefusedError
from pympa.hardware.device import Device
from pympa.kernels import Core
from pympa.kernels.core import CoreKernels
from pympa.runtime.arena import Arena, Array
from pympa.runtime.trace import Trace

_DTYPES = ("bfloat16", "float16")  # the dtypes that tensor cores multiply exactly

DEVICE_ROWS = 65536
"""The rows of an MLP, or of a dispatch to experts, at a time: enough to fill any device."""


@dataclass(frozen=True)
class Accelerator:
    """A device and the module of its kernels."""

    device: Device
    core: Core


def check_dtype(dtype: np.dtype[Any]) -> None:
    """Refuse a dtype that attention has no kernels for.

    Raises:
        RefusedError: the dtype is not allowed; the message names the allowed ones.
    """
    if dtype.name not in _DTYPES:
        raise RefusedError(
            f"backend cuda: dtype: expected {' or '.join(_DTYPES)}; got {dtype.name}"
        )


def open_accelerator(local_index: int, *, timeout_seconds: float) -> Accelerator:
    """Return a GPU of this node with its kernels.

    Args:
        local_index: the index of this rank on its node.
        timeout_seconds: the longest time that the host waits for the device.

    Raises:
        RefusedError: the kernels, cuBLASLt or a device are missing.
    """
    try:
        import pympa._cuda as core
    except ImportError as error:
        raise RefusedError(
            f"backend cuda: pympa was built without CUDA kernels ({error}); build it where nvcc is "
            "found: CMAKE_ARGS=-DPYMPA_CUDA=ON pip install 'pympa[cuda]'"
        ) from None
    from pympa.hardware.device_cupy import CupyDevice

    device = CupyDevice(local_index, timeout_seconds=timeout_seconds)
    try:
        core.load_gemm(_cublas_directory())
    except RuntimeError as error:
        raise RefusedError(f"backend cuda: {error}") from None
    return Accelerator(device, core)


def _cublas_directory() -> str:
    """Return the folder of cuBLAS in NVIDIA's Python packages, or "" without them."""
    package = importlib.util.find_spec("nvidia")
    for folder in (package and package.submodule_search_locations) or []:
        for library in sorted(Path(folder).glob("c*/lib/libcublasLt.so.*")):
            return str(library.parent)
    return ""


class CudaKernels(CoreKernels):
    """See `Kernels`. Calls return before kernels have run, except those that return a value.

    Args:
        accelerator: the GPU and its kernels.
        arena: the arena on its memory.
        trace: the trace on a clock of its events.
    """

    piece_flops = math.inf  # the host polls messages while kernels run
    row_chunk = dispatch_rows = DEVICE_ROWS
    fuses_mlp = False
    threads = 1
    cache_bytes = 0

    def __init__(self, *, accelerator: Accelerator, arena: Arena, trace: Trace) -> None:
        self._device, core = accelerator.device, accelerator.core
        on = core.Execution("cuda", stream=self._device.compute)
        super().__init__(core=core, on=on, arena=arena, trace=trace)

    def _placed(self, out: Array, read: Callable[[Array], Array]) -> Array:
        self._device.write(out, read(np.empty(out.shape, out.dtype)))
        return out

    def read(self, array: Array) -> NDArray[Any]:
        """See `Kernels.read`."""
        if array.flags.c_contiguous:
            return self._device.read(array)
        with self._arena.scope():
            whole = self._arena.empty(array.shape, array.dtype)
            self._copy(array, whole)
            return self._device.read(whole)

    def _to_device(self, index: Array | NDArray[np.int32]) -> Array:
        if self._device.owns(index):
            return index
        copied = self._arena.empty(index.shape, index.dtype, "workspaces")
        self._device.write(copied, index)
        return copied

    def _synchronize(self, what: str) -> None:
        self._device.synchronise(what)

    def _copy(self, source: Array, out: Array) -> None:
        self._core.copy(source=source, out=out, **self._execution)
