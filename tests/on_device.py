"""`CudaKernels` behind arrays of the host, on a GPU or on its emulation: what tests/gpu works with.

The emulation runs the same sources thread by thread, some million times slower than a GPU, so
shapes come from `most`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from emulated import EmulatedCore, EmulatedDevice
from pympa.arena import Arena
from pympa.contract import TOLERANCE
from pympa.device import Device
from pympa.errors import RefusedError
from pympa.kernels import PackedWeight, State
from pympa.kernels.cuda import Accelerator, CudaKernels, open_accelerator
from pympa.spec import DTYPES
from pympa.trace import Trace

HALVES = (DTYPES["bfloat16"], DTYPES["float16"])
"""What attention and products compute in."""

ALL_DTYPES = (*HALVES, DTYPES["float32"])


class Recorder:
    """A core that keeps the names of the functions that were called."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.called: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.called.add(name)
        return getattr(self._core, name)


class Workbench:
    """Kernels, and arrays that go to them and back.

    Args:
        device: has the memory. core: has the kernels.
        emulated: takes small shapes only.
    """

    def __init__(self, device: Device, core: Any, *, emulated: bool) -> None:
        self.emulated, self.core, self.device = emulated, Recorder(core), device
        self.arena = Arena(device=device)
        accelerator = Accelerator(device, self.core)
        self.kernels = CudaKernels(accelerator=accelerator, arena=self.arena, trace=Trace())

    def most(self, on_gpu: int, emulated: int) -> int:
        """Return the largest size to try."""
        return emulated if self.emulated else on_gpu

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Give back the memory of the body."""
        with self.arena.scope():
            yield
            self.device.synchronise("a test")

    def put(self, host: np.ndarray[Any, Any]) -> Any:
        """Return a copy on the device."""
        array = self.arena.empty(host.shape, host.dtype)
        self.device.write(array, host)
        return array

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return an array of NaN, or of -1: what was not written shows."""
        poison = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xFF, np.uint8)
        return self.put(poison.view(dtype).reshape(shape))

    def get(self, array: Any) -> np.ndarray[Any, Any]:
        """Return a copy on the host."""
        return self.kernels.read(array)

    def weight(self, host: np.ndarray[Any, Any]) -> PackedWeight:
        """Return a weight `[n, k]`, or a group of them `[groups, n, k]`, packed."""

        def fill(index: int, target: Any) -> None:
            target[...] = host.reshape(-1, *host.shape[-2:])[index]

        n, k = host.shape[-2:]
        groups = self.kernels.pack_group(host.size // max(n * k, 1), (n, k), host.dtype, fill)
        return groups if host.ndim == 3 else PackedWeight(groups.data[0], n, k)

    def state(self, rows: int, heads: int, v_head_dim: int) -> State:
        """Return a state that has seen no key."""
        row_max, row_sum = (self.empty((rows, heads), np.float32) for _ in range(2))
        state = State(row_max, row_sum, self.empty((rows, heads, v_head_dim), np.float32))
        self.kernels.start_state(state)
        return state

    def finished(self, state: State, dtype: Any) -> tuple[Any, Any]:
        """Return o and lse of a state, on the host."""
        o, lse = self.empty(state.out.shape, dtype), self.empty(state.row_max.shape, np.float32)
        self.kernels.finish(state, o, lse)
        return self.get(o), self.get(lse)


def open_workbench(machine: str) -> Workbench | str:
    """Return a workbench on "gpu" or "emulated", or why there is none."""
    if machine == "gpu":
        try:
            accelerator = open_accelerator(0, timeout_seconds=60)
        except RefusedError as error:
            return str(error)
        return Workbench(accelerator.device, accelerator.core, emulated=False)
    try:
        core = importlib.import_module("pympa._cuda_emulated")
    except ImportError as error:
        return f"{error}; CMAKE_ARGS=-DPYMPA_CUDA_EMULATED=ON pip install . builds it"
    device = EmulatedDevice()
    return Workbench(device, EmulatedCore(core, device), emulated=True)


def normal(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, scale: float = 1.0
) -> np.ndarray[Any, Any]:
    """Return normal numbers of a dtype."""
    return (rng.standard_normal(shape) * scale).astype(np.float32).astype(dtype)


def wide(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an array in float64."""
    return array.astype(np.float64)


def assert_close(got: Any, want: Any, dtype: Any) -> None:
    """Compare with float64 as the contract does: the norm, and the worst row by 8; no NaN."""
    got, want = wide(np.asarray(got)), wide(np.asarray(want))
    assert got.shape == want.shape
    if not got.size:
        return
    tolerance = TOLERANCE[np.dtype(dtype).name]
    assert np.isfinite(got).all(), "NaN, or an element that was not written"
    error = np.linalg.norm(got - want)
    assert error <= tolerance * np.linalg.norm(want) + 1e-30, error / np.linalg.norm(want)
    rows = np.sqrt(((got - want) ** 2).reshape(len(got), -1).sum(axis=1))
    typical = np.sqrt((want**2).sum() / len(want))
    assert rows.max() <= 8 * tolerance * typical + 1e-30, (rows.argmax(), rows.max() / typical)


def assert_same_bits(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> None:
    """Compare byte by byte."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    different = (raw_rows(got) != raw_rows(want)).any(axis=1)
    assert not different.any(), f"rows {np.flatnonzero(different)[:8]} of {len(got)} differ"


def raw_rows(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the bytes of each row."""
    plain = np.ascontiguousarray(array)
    return plain.view(np.uint8).reshape(len(plain), -1) if plain.size else np.empty((0, 1))
