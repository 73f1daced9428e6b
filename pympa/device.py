"""One accelerator as its rank sees it: memory, streams, events and copies.

`Device` is all that the arena, the transports and the clock know of a GPU; `pympa.device_cupy` is
one. A stream runs what it is given in order, beside other streams and behind the host's back; an
event marks a place in a stream, for another stream or the host to wait for. Both are handles, plain
integers as CUDA has them. The host waits in one place only, `finish`, which has a deadline and
looks after messages meanwhile: a rank whose peer has died must not sleep inside the driver.
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
"""An array in the memory of a device; it has the attributes of a NumPy array that pympa uses."""

_HALF_WINDOW_BYTES = 4 << 20  # 80 µs of PCIe 5: long enough to hide what a copy costs to start


class Device(ABC):
    """One accelerator.

    Attributes:
        name: with its number, as messages call it.
        bus_id: tells one device of a node from another, whatever number each process gives it.
        compute: the stream of kernels.
        timeout_seconds: the longest that the host waits for its kernels.
        watchers: called again and again while the host waits. They tell whether the device itself
            waits for other ranks, the time of which is theirs to limit, by raising an error.
        timed_events: of the marks of a step; the next step uses them again.
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
        """Make this the device of the calling thread."""

    @abstractmethod
    def allocate(self, size: int) -> DeviceArray:
        """Return uint8 `[size]` in its memory, aligned to 256 bytes, freed with its last view.

        Raises:
            MemoryError: there is not so much.
        """

    @abstractmethod
    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Return uint8 `[size]` in memory of the host that copies reach without the host."""

    @abstractmethod
    def owns(self, array: Any) -> bool:
        """Tell whether an array is in memory of a device."""

    @abstractmethod
    def stream(self, *, urgent: bool = False) -> int:
        """Return a new stream, which lives as long as the device.

        Args:
            urgent: what is on it goes before what other streams have yet to begin: messages, which
                would otherwise wait for all blocks of a large kernel.
        """

    @abstractmethod
    def event(self, *, timed: bool = False) -> int:
        """Return a new event, which lives as long as the device.

        Args:
            timed: `seconds` may be asked of it, for which the device writes down the time.
        """

    @abstractmethod
    def record(self, event: int, stream: int) -> None:
        """Move an event to the present end of a stream."""

    @abstractmethod
    def wait(self, stream: int, event: int) -> None:
        """Let a stream wait for where an event is now; the host goes on."""

    @abstractmethod
    def done(self, event: int) -> bool:
        """Tell whether all before an event has been done; one never recorded counts as done."""

    @abstractmethod
    def seconds(self, start: int, stop: int) -> float:
        """Return the seconds between two events that are done."""

    @abstractmethod
    def copy(self, target: Any, source: Any, stream: int) -> None:
        """Copy as many bytes between device arrays, or between one and `pinned` memory.

        Both are C-contiguous. Nothing waits; the arrays live until the stream has passed.
        """

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Return the free bytes of the device and all that it has."""

    @abstractmethod
    def close(self) -> None:
        """Destroy streams and events; nothing may be under way."""

    def take_event(self) -> int:
        """Return an event that nobody uses, for `give_event`; without time."""
        return self._spare.pop() if self._spare else self.event()

    def give_event(self, event: int) -> None:
        """Let others use an event; streams that wait for it have been told so before."""
        self._spare.append(event)

    def finish(self, event: int, what: str) -> None:
        """Return when an event is done.

        Args:
            event: that was recorded.
            what: is waited for.

        Raises:
            TimeoutError: it took longer than `timeout_seconds`.
        """
        deadline = time.monotonic() + self.timeout_seconds
        while not self.done(event):
            elsewhere = [watch() for watch in self.watchers]
            if any(elsewhere):
                deadline = time.monotonic() + self.timeout_seconds
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{self.name} did not come to the end of {what} within "
                    f"{self.timeout_seconds:g} s; raise --timeout if the work takes longer"
                )
            os.sched_yield()

    def synchronise(self, what: str) -> None:
        """Return when all kernels so far are done; see `finish`."""
        event = self.take_event()
        self.record(event, self.compute)
        self.finish(event, what)
        self.give_event(event)

    def read(self, array: DeviceArray) -> NDArray[Any]:
        """Return a C-contiguous device array's elements on the host, as kernels so far leave them.

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

        May return before the copies are done; kernels after it see them, and the host array may
        change.

        Raises:
            ValueError: another shape or dtype. TimeoutError: see `finish`.
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
        """Return pinned memory for a copy by the stream of kernels, of half the window at most.

        While one half of the window fills, the copies of the other one end.
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
    """Cut so many bytes into pieces that half the window can take."""
    step = _HALF_WINDOW_BYTES
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def flat_bytes(array: Any) -> Any:
    """Return a C-contiguous array's memory as uint8, on the host or a device.

    Raises:
        ValueError: the array has gaps.
    """
    if not array.flags.c_contiguous:
        raise ValueError(f"expected a C-contiguous array; got strides {array.strides}")
    return array.reshape(-1).view(np.uint8)


def local_index(rank: int, nodes: Sequence[str]) -> int:
    """Return a rank's number among the ranks of its node.

    Args:
        rank: of the world.
        nodes: name of each rank's node.
    """
    return Counter(nodes[:rank])[nodes[rank]]
