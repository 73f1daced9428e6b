"""CuPy's real arrays over memory of the host, for `CupyDevice` where there is no GPU.

CUDA's runtime is replaced by one that does everything at once and checks its handles. So all of the
code between CuPy and the kernels runs as on a GPU, with CuPy's own slices, views and shapes.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np

_GUARD_BYTES = 256


class HostRuntime:
    """What `CupyDevice` calls of `cupy.cuda.runtime`."""

    CUDARuntimeError = cupy.cuda.runtime.CUDARuntimeError
    streamNonBlocking, memcpyDefault, eventDefault, eventDisableTiming = 1, 4, 0, 2  # noqa: N815

    def __init__(self) -> None:
        self.streams: set[int] = set()
        self.events: dict[int, bool] = {}
        self.copied_bytes = 0

    def setDevice(self, device: int) -> None:  # noqa: N802
        assert device == 0

    def getDeviceCount(self) -> int:  # noqa: N802
        return 1

    def getDeviceProperties(self, device: int) -> dict[str, Any]:  # noqa: N802
        return {"name": b"memory of the host"}

    def deviceGetPCIBusId(self, device: int) -> str:  # noqa: N802
        return "0000:00:00.0"

    def streamCreateWithPriority(self, flags: int, priority: int) -> int:  # noqa: N802
        assert flags == self.streamNonBlocking
        assert priority <= 0
        self.streams.add(1 + len(self.streams))
        return len(self.streams)

    def streamDestroy(self, stream: int) -> None:  # noqa: N802
        self.streams.remove(stream)

    def streamWaitEvent(self, stream: int, event: int) -> None:  # noqa: N802
        assert stream in self.streams
        assert event in self.events

    def eventCreateWithFlags(self, flags: int) -> int:  # noqa: N802
        event = 1000 + len(self.events)
        self.events[event] = flags == self.eventDefault
        return event

    def eventDestroy(self, event: int) -> None:  # noqa: N802
        del self.events[event]

    def eventRecord(self, event: int, stream: int) -> None:  # noqa: N802
        assert stream in self.streams
        assert event in self.events

    def eventQuery(self, event: int) -> int:  # noqa: N802
        assert event in self.events
        return 0

    def eventElapsedTime(self, start: int, stop: int) -> float:  # noqa: N802
        assert self.events[start], "an event without time"
        assert self.events[stop], "an event without time"
        return float(stop - start)

    def memcpyAsync(  # noqa: N802
        self, target: int, source: int, size: int, kind: int, stream: int
    ) -> None:
        assert kind == self.memcpyDefault
        assert stream in self.streams
        ctypes.memmove(target, source, size)
        self.copied_bytes += size

    def memGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return 1 << 30, 1 << 31


def host_memory(size: int) -> Any:
    """Stand in for `cupy.cuda.memory.Memory`, aligned as that is."""
    raw = np.full(size + _GUARD_BYTES, 0xFF, np.uint8)
    at = raw.ctypes.data
    return cupy.cuda.UnownedMemory(at + -at % _GUARD_BYTES, size, raw, 0)


def cupy_on_host() -> Any:
    """Return what `CupyDevice` uses of CuPy, on the host."""
    memory = cupy.cuda.memory
    return SimpleNamespace(
        ndarray=cupy.ndarray,
        cuda=SimpleNamespace(
            runtime=HostRuntime(),
            memory=SimpleNamespace(
                Memory=host_memory,
                MemoryPointer=memory.MemoryPointer,
                OutOfMemoryError=memory.OutOfMemoryError,
            ),
            pinned_memory=SimpleNamespace(
                PinnedMemory=lambda size: bytearray(size),
                PinnedMemoryPointer=lambda memory, offset: memoryview(memory)[offset:],
            ),
        ),
    )


def on_host(array: Any) -> Any:
    """Return the elements of a CuPy array where they are; anything else as it is."""
    if not isinstance(array, cupy.ndarray):
        return array
    if not array.size:
        return np.empty(array.shape, array.dtype)
    span = sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True))
    raw = (ctypes.c_uint8 * (span + array.itemsize)).from_address(array.data.ptr)
    return np.ndarray(array.shape, array.dtype, raw, strides=array.strides)


class HostCore:
    """The functions of a core for the CPU, for CuPy arrays."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def Execution(self, kind: str, *, stream: int) -> Any:  # noqa: N802
        return self._core.Execution(kind, stream=0)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._core, name)

        def call(**arguments: Any) -> Any:
            return function(**{key: on_host(value) for key, value in arguments.items()})

        return call
