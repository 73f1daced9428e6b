"""One accelerator of a rank: memory, streams, events and copies.

The arena, the transports and the clock use a GPU only through `Device`; `device_cupy` implements
it with CuPy. A stream runs its work in order, concurrently with other streams and with the host. An
event marks a position in a stream, for which another stream or the host can wait. Both are plain
integer handles, as in CUDA. The host waits only in `finish`, which has a deadline and polls
messages meanwhile: a rank whose peer has died must not block inside the driver.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DeviceArray = Any
"""An array in the memory of a device, with the attributes of a NumPy array that pympa uses."""

_HALF_WINDOW_BYTES = 4 << 20  # 80 µs of PCIe 5: long enough to hide the start of a copy


class Device(ABC):
    """One accelerator.

    Attributes:
        name: the name with the number of the device, for messages.
        bus_id: the bus address, which identifies the device in all processes of a node.
        compute: the stream of kernels.
        timeout_seconds: the longest time that the host waits for its kernels.
        watchers: the functions that are called repeatedly while the host waits. They return whether
            the device itself waits for other ranks; they limit that time themselves by raising an
            error.
        timed_events: the events that mark a step; the next step reuses them.
    """

    name: str
    bus_id: str
    compute: int

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.watchers: list[Callable[[], bool]] = []
        self.timed_events: list[int] = []
        self._spare: list[int] = []
        self._window: NDArray[np.uint8] | None = None
        self._copied: list[int] = []
        self._half = self._filled = 0

    @abstractmethod
    def bind(self) -> None:
        """Make this device the current one of the calling thread."""

    @abstractmethod
    def allocate(self, size: int) -> DeviceArray:
        """Return uint8 `[size]` in its memory, aligned to 256 bytes, freed with its last view.

        Raises:
            MemoryError: the device has too little free memory.
        """

    @abstractmethod
    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Return uint8 `[size]` in page-locked memory of the host, for asynchronous copies."""

    @abstractmethod
    def owns(self, array: Any) -> bool:
        """Return whether an array is in memory of a device."""

    @abstractmethod
    def stream(self, *, urgent: bool = False) -> int:
        """Return a new stream, which lives as long as the device.

        Args:
            urgent: whether its work starts before the waiting work of other streams. Messages need
                it: otherwise they would wait for all blocks of a large kernel.
        """

    @abstractmethod
    def event(self, *, timed: bool = False) -> int:
        """Return a new event, which lives as long as the device.

        Args:
            timed: whether the device records the time of the event, for `seconds`.
        """

    @abstractmethod
    def record(self, event: int, stream: int) -> None:
        """Move an event to the current end of a stream."""

    @abstractmethod
    def wait(self, stream: int, event: int) -> None:
        """Make a stream wait for the current position of an event; the host does not wait."""

    @abstractmethod
    def done(self, event: int) -> bool:
        """Return whether all work before an event is done; true if it was never recorded."""

    @abstractmethod
    def seconds(self, start: int, stop: int) -> float:
        """Return the seconds between two completed events."""

    @abstractmethod
    def copy(self, target: Any, source: Any, stream: int) -> None:
        """Copy all bytes between device arrays, or between one and `pinned` memory.

        Both are C-contiguous. The call does not wait; the arrays must live until the copy is done.
        """

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Return the free bytes and all bytes of the device."""

    @abstractmethod
    def close(self) -> None:
        """Destroy streams and events; no work may be in flight."""

    def take_event(self) -> int:
        """Return an unused event without time, to be returned by `give_event`."""
        return self._spare.pop() if self._spare else self.event()

    def give_event(self, event: int) -> None:
        """Make an event available for reuse; streams that wait for it have their wait recorded."""
        self._spare.append(event)

    def finish(self, event: int, what: str) -> None:
        """Wait until an event is done.

        Args:
            event: an event that was recorded.
            what: the name of the work before it, for the message.

        Raises:
            TimeoutError: the work took longer than `timeout_seconds`.
        """
        deadline = time.monotonic() + self.timeout_seconds
        while not self.done(event):
            elsewhere = [watch() for watch in self.watchers]
            if any(elsewhere):
                deadline = time.monotonic() + self.timeout_seconds
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{self.name} did not finish {what} within {self.timeout_seconds:g} s; "
                    "raise --timeout if the work takes longer"
                )
            os.sched_yield()

    def synchronise(self, what: str) -> None:
        """Wait until all kernels so far are done; see `finish`."""
        event = self.take_event()
        self.record(event, self.compute)
        self.finish(event, what)
        self.give_event(event)

    def read(self, array: DeviceArray) -> NDArray[Any]:
        """Return the elements of a C-contiguous device array on the host, after all kernels so far.

        Raises:
            TimeoutError: see `finish`.
        """
        host = np.empty(array.shape, array.dtype)
        target, source = host.reshape(-1).view(np.uint8), flat_bytes(array)
        for piece in _pieces(len(source)):
            room = self._room(len(source[piece]))
            self.copy(room, source[piece], self.compute)
            self.synchronise("a copy to the host")
            target[piece] = room
        return host

    def write(self, array: DeviceArray, host: NDArray[Any]) -> None:
        """Set a C-contiguous device array to a host array of its shape and dtype, after kernels.

        May return before the copies are done. Later kernels see the new values, and the host array
        may be changed.

        Raises:
            ValueError: the host array has another shape or dtype.
            TimeoutError: see `finish`.
        """
        if array.shape != host.shape or array.dtype != host.dtype:
            raise ValueError(
                f"write: expected {array.dtype} {list(array.shape)}; "
                f"got {host.dtype} {list(host.shape)}"
            )
        target, source = flat_bytes(array), np.ascontiguousarray(host).reshape(-1).view(np.uint8)
        for piece in _pieces(len(target)):
            room = self._room(len(source[piece]))
            room[:] = source[piece]
            self.copy(target[piece], room, self.compute)

    def _room(self, size: int) -> NDArray[np.uint8]:
        """Return pinned memory for a copy by the stream of kernels, at most half the window.

        While one half of the window is filled, the copies from the other half complete.
        """
        if self._window is None:
            self._window = self.pinned(2 * _HALF_WINDOW_BYTES)
            self._copied = [self.event() for _ in range(2)]
        if self._filled + size > _HALF_WINDOW_BYTES:
            self.record(self._copied[self._half], self.compute)
            self._half, self._filled = 1 - self._half, 0
            self.finish(self._copied[self._half], "copies between it and the host")
        start = self._half * _HALF_WINDOW_BYTES + self._filled
        self._filled += size
        return self._window[start : start + size]


def _pieces(size: int) -> list[slice]:
    """Cut a number of bytes into pieces that fit half the window."""
    step = _HALF_WINDOW_BYTES
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def flat_bytes(array: Any) -> Any:
    """Return a C-contiguous array's memory as uint8, on the host or a device.

    Raises:
        ValueError: the array is not contiguous.
    """
    if not array.flags.c_contiguous:
        raise ValueError(f"expected a C-contiguous array; got strides {array.strides}")
    return array.reshape(-1).view(np.uint8)


def local_index(rank: int, nodes: Sequence[str]) -> int:
    """Return the index of a rank among the ranks of its node.

    Args:
        rank: the number of the rank in the world.
        nodes: the name of each rank's node.
    """
    return Counter(nodes[:rank])[nodes[rank]]
