"""One rig for kernels: those of a core, on memory of the host or of a device.

`Calls` gives the bare functions of a core on arrays of the host, which the CPU's cores take, and
the GPU's as an interpreter runs it. `kernels` is what a model works with (`CpuKernels`,
`CudaKernels`), on arrays that `put` and `empty` make and `get` reads. The interpreter is some
million times slower than a GPU, so shapes come from `most`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from pympa import _core
from pympa.errors import RefusedError
from pympa.hardware.device import Device
from pympa.kernels import PackedWeight, State
from pympa.kernels.core import CoreKernels
from pympa.kernels.cpu import CpuKernels
from pympa.kernels.cuda import Accelerator, CudaKernels, open_accelerator
from pympa.runtime.arena import Arena
from pympa.runtime.trace import Trace
from support.calls import Array, Calls
from support.emulated import EmulatedCore, EmulatedDevice

BEST_ISA = _core.supported_isas()[0]


class Recorder:
    """A core that keeps the names of the functions that were called."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.called: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.called.add(name)
        return getattr(self._core, name)


class Rig(Calls):
    """See the module.

    Args:
        core: has the kernels. isa: of them, or "cuda".
        device: whose memory they take; None means the host's.
        emulated: takes small shapes only.
    """

    def __init__(
        self, core: Any, isa: str, device: Device | None = None, *, emulated: bool = False
    ) -> None:
        self.core, self.isa, self.device, self.emulated = core, isa, device, emulated
        self.arena = Arena(device=device)

    @cached_property
    def kernels(self) -> CoreKernels:
        """What a model works with."""
        if self.device is None:
            return CpuKernels(isa=self.isa, threads=1, arena=self.arena, trace=Trace())
        accelerator = Accelerator(self.device, self.core)
        return CudaKernels(accelerator=accelerator, arena=self.arena, trace=Trace())

    def accuracy(self, dtype: Any) -> Any:
        """Return the dtype whose tolerance sums of products of `dtype` keep before rounding.

        Products are exact and sums are float32, except where a float16 is split into two bfloat16
        and the product of the smaller halves is left out.
        """
        splits = self.isa.startswith("amx") and np.dtype(dtype) == np.float16
        return dtype if splits else np.float32

    def most(self, on_gpu: int, emulated: int) -> int:
        """Return the largest size to try."""
        return emulated if self.emulated else on_gpu

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Give back the memory of the body."""
        with self.arena.scope():
            yield
            if self.device is not None:
                self.device.synchronise("a test")

    def put(self, host: Array) -> Any:
        """Return a copy where the kernels are."""
        array = self.arena.empty(host.shape, host.dtype)
        self.kernels.fill(array, lambda target: np.copyto(target, host))
        return array

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return an array of NaN, or of -1: what was not written shows."""
        poison = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xFF, np.uint8)
        return self.put(poison.view(dtype).reshape(shape))

    def get(self, array: Any) -> Array:
        """Return a copy on the host."""
        return self.kernels.read(array)

    def weight(self, host: Array) -> PackedWeight:
        """Return a weight `[n, k]`, or a group of them `[groups, n, k]`, packed."""

        n, k = host.shape[-2:]
        all_weights = host.reshape(-1, n, k)
        groups = self.kernels.pack_group(
            host.size // max(n * k, 1), (n, k), host.dtype, lambda i, a, b, _: all_weights[i, a:b]
        )
        return groups if host.ndim == 3 else PackedWeight(groups.data[0], n, k)

    def new_state(self, rows: int, heads: int, v_head_dim: int) -> State:
        """Return a state that has seen no key."""
        if self.device is None:
            return State(
                np.full((rows, heads), -np.inf, np.float32),
                np.zeros((rows, heads), np.float32),
                np.zeros((rows, heads, v_head_dim), np.float32),
            )
        row_max, row_sum = (self.empty((rows, heads), np.float32) for _ in range(2))
        state = State(row_max, row_sum, self.empty((rows, heads, v_head_dim), np.float32))
        self.kernels.start_state(state)
        return state

    def finish(self, state: Any, dtype: Any, threads: int = 1) -> tuple[Array, Array]:
        """Return o and lse of a state, on the host."""
        row_max, _, out = state
        if self.device is None:
            o, lse = np.full(out.shape, np.nan, dtype), np.full(row_max.shape, np.nan, np.float32)
            self.core.finish(*state, o, lse, self.on(threads))
            return o, lse
        o, lse = self.empty(out.shape, dtype), self.empty(row_max.shape, np.float32)
        self.kernels.finish(state, o, lse)
        return self.get(o), self.get(lse)

    def attention(self, q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
        """Return (o, lse) of one bare call over everything."""
        state = self.new_state(q.shape[0], q.shape[1], v.shape[2])
        options.setdefault("q_ranges", [(0, 0, q.shape[0])])
        options.setdefault("k_ranges", [(0, 0, k.shape[0])])
        self.attend(q, k, v, state, **options)
        return self.finish(state, q.dtype)


def cpu_rig(isa: str = BEST_ISA) -> Rig:
    """Return a rig on the CPU."""
    return Rig(_core, isa)


def interpreted_rig() -> Rig | str:
    """Return the bare functions for a GPU as an interpreter runs them on arrays of the host.

    Or why there are none.
    """
    core = _interpreter()
    return core if isinstance(core, str) else Rig(core, "cuda", emulated=True)


def device_rig(machine: str) -> Rig | str:
    """Return a rig on a "gpu", or on an "emulated" device; or why there is none."""
    if machine == "gpu":
        try:
            accelerator = open_accelerator(0, timeout_seconds=60)
        except RefusedError as error:
            return str(error)
        return Rig(Recorder(accelerator.core), "cuda", accelerator.device)
    core, device = _interpreter(), EmulatedDevice()
    if isinstance(core, str):
        return core
    return Rig(Recorder(EmulatedCore(core, device)), "cuda", device, emulated=True)


def _interpreter() -> Any:
    """Return the module, or why there is none."""
    try:
        return importlib.import_module("pympa._cuda_emulated")
    except ImportError as error:
        return f"{error}; CMAKE_ARGS=-DPYMPA_CUDA_EMULATED=ON pip install . builds it"
