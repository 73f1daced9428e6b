"""A CUDA device by CuPy: runtime calls, and arrays over memory that is allocated here.

CuPy's memory pools are not used. The arena allocates large blocks once, and a pool could call
`cudaFree` at any time, which waits for the whole device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.errors import RefusedError
from pympa.hardware.device import Device, DeviceArray

_INSTALL = "pip install 'pympa[cuda]'"
_HIGHEST_PRIORITY = -100  # CUDA uses the nearest priority that the device has
_NOT_READY = 600  # cudaErrorNotReady


class CupyDevice(Device):
    """See `Device`.

    Args:
        local_index: the index of this rank on its node. Ranks use the devices round-robin, and
            share them if there are more ranks than devices.
        timeout_seconds: the longest time that the host waits for the device.

    Attributes:
        index: the number of the device in this process.

    Raises:
        RefusedError: CuPy, the driver or the device is missing, or other programs use it
            exclusively.
    """

    def __init__(self, local_index: int, *, timeout_seconds: float = 300.0) -> None:
        super().__init__(timeout_seconds)
        self._cupy = cupy = import_cupy()
        self._runtime = cupy.cuda.runtime
        self._streams: list[int] = []
        self._events: list[int] = []
        self.index = local_index % count_devices()
        try:
            self.bind()
            properties = self._runtime.getDeviceProperties(self.index)
            self.bus_id = str(self._runtime.deviceGetPCIBusId(self.index))
            self.compute = self.stream()
        except self._runtime.CUDARuntimeError as error:
            raise RefusedError(f"backend cuda: GPU {self.index}: {_reason(error)}") from None
        self.name = f"GPU {self.index} ({properties['name'].decode()})"

    def bind(self) -> None:
        """See `Device.bind`."""
        self._runtime.setDevice(self.index)

    def allocate(self, size: int) -> DeviceArray:
        """See `Device.allocate`."""
        cuda = self._cupy.cuda
        try:
            memory = cuda.memory.Memory(size)
        except (self._runtime.CUDARuntimeError, cuda.memory.OutOfMemoryError):
            free, total = self.memory()
            raise MemoryError(
                f"{self.name}: expected at most {free} of its {total} bytes, which are free; "
                f"got a request for {size}"
            ) from None
        return device_array(cuda.memory.MemoryPointer(memory, 0), (size,), np.dtype(np.uint8))

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """See `Device.pinned`."""
        pinned = self._cupy.cuda.pinned_memory
        pointer = pinned.PinnedMemoryPointer(pinned.PinnedMemory(size), 0)
        return np.frombuffer(pointer, np.uint8, size)

    def owns(self, array: Any) -> bool:
        """See `Device.owns`."""
        return isinstance(array, self._cupy.ndarray)

    def stream(self, *, urgent: bool = False) -> int:
        """See `Device.stream`."""
        # The default stream, which libraries may use, must not block this stream.
        flags, priority = self._runtime.streamNonBlocking, _HIGHEST_PRIORITY if urgent else 0
        self._streams.append(self._runtime.streamCreateWithPriority(flags, priority))
        return self._streams[-1]

    def event(self, *, timed: bool = False) -> int:
        """See `Device.event`."""
        flags = self._runtime.eventDefault if timed else self._runtime.eventDisableTiming
        self._events.append(self._runtime.eventCreateWithFlags(flags))
        return self._events[-1]

    def record(self, event: int, stream: int) -> None:
        """See `Device.record`."""
        self._runtime.eventRecord(event, stream)

    def wait(self, stream: int, event: int) -> None:
        """See `Device.wait`."""
        self._runtime.streamWaitEvent(stream, event)

    def done(self, event: int) -> bool:
        """See `Device.done`."""
        status = self._runtime.eventQuery(event)
        if status not in (0, _NOT_READY):
            self._runtime.check_status(status)  # a kernel before it has failed
        return bool(status == 0)

    def seconds(self, start: int, stop: int) -> float:
        """See `Device.seconds`; float32 milliseconds, so a resolution of 1 µs in 16 s."""
        return float(self._runtime.eventElapsedTime(start, stop)) / 1e3

    def copy(self, target: Any, source: Any, stream: int) -> None:
        """See `Device.copy`."""
        if target.nbytes != source.nbytes:
            raise ValueError(f"copy: expected {target.nbytes} bytes; got {source.nbytes}")
        if target.nbytes:
            self._runtime.memcpyAsync(
                address(target), address(source), target.nbytes, self._runtime.memcpyDefault, stream
            )

    def memory(self) -> tuple[int, int]:
        """See `Device.memory`."""
        free, total = self._runtime.memGetInfo()
        return int(free), int(total)

    def close(self) -> None:
        """See `Device.close`."""
        for event in self._events:
            self._runtime.eventDestroy(event)
        for stream in self._streams:
            self._runtime.streamDestroy(stream)
        self._events, self._streams, self._spare = [], [], []


def device_array(pointer: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
    """Return a CuPy array of any dtype, including bfloat16, over memory at a CuPy pointer."""
    return import_cupy().ndarray(shape, dtype, memptr=pointer)


def address(array: Any) -> int:
    """Return the memory address of an array of the host or of a device."""
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


def count_devices() -> int:
    """Return the number of devices that this process can use.

    Raises:
        RefusedError: there is no device, or no driver.
    """
    runtime = import_cupy().cuda.runtime
    try:
        count = int(runtime.getDeviceCount())
    except runtime.CUDARuntimeError as error:
        if "NoDevice" in str(error):
            count = 0
        else:
            raise RefusedError(
                f"backend cuda: {_reason(error)}; install an NVIDIA driver that `nvidia-smi` "
                "reports as CUDA 13 or newer, or use --backend cpu"
            ) from None
    if count == 0:
        raise RefusedError(
            "backend cuda: the driver shows no GPU to this process; request one from the "
            "scheduler, "
            "check CUDA_VISIBLE_DEVICES, or use --backend cpu"
        )
    return count


def _reason(error: Exception) -> str:
    """Return CUDA's text of an error without the name of its code."""
    return str(error).partition(": ")[2] or str(error)


def nvtx_ranges() -> tuple[Callable[[str], object], Callable[[], object]]:
    """Return the functions that begin a named range for NVIDIA's profilers, and end the last one.

    Raises:
        RefusedError: CuPy is missing.
    """
    nvtx = import_cupy().cuda.nvtx
    return nvtx.RangePush, nvtx.RangePop


def import_cupy() -> Any:
    """Return CuPy, without its warnings on ranks that lack a library.

    Raises:
        RefusedError: CuPy is missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cupy
            import cupy.cuda.nccl
    except ImportError as error:
        raise RefusedError(
            f"backend cuda: CuPy cannot be imported ({error}); install it with: {_INSTALL}, or "
            "use --backend cpu"
        ) from None
    return cupy
