"""A device without a GPU, for tests: arrays that the host may not touch, and streams that lag.

What is put on a stream is only kept. When the host asks whether an event is done, a few things of
any streams run, in a random order that repeats with the seed and respects nothing but the order of
each stream and the events that it waits for. So a kernel that should have waited, or memory that
was used again too soon, shows as a wrong result. Devices of one machine run each other's streams,
as if they had clocks of their own.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pympa.hardware.device import Device, flat_bytes

_MOST_STEPS = 4  # that one look at an event makes


def _forbidden(self: Any, *_: Any, **__: Any) -> Any:
    raise TypeError("the host touched an array of a device")


class DeviceArray(np.ndarray):
    """Has a shape, a dtype and views; its elements are for kernels and copies only."""

    __setitem__ = __array_ufunc__ = __array_function__ = __reduce__ = __reduce_ex__ = _forbidden
    __float__ = __int__ = __bool__ = copy = tobytes = tolist = item = fill = _forbidden

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        return part if isinstance(part, np.ndarray) else _forbidden(self)


def plain(array: Any) -> Any:
    """Return what kernels see of an array of a device; anything else as it is."""
    return array.view(np.ndarray) if isinstance(array, DeviceArray) else array


@dataclass
class _Ticket:
    """One recording of an event: the machine's time at which the stream came to it, or None."""

    time: int | None = None


class _Entry(NamedTuple):
    ready: Callable[[], bool]
    run: Callable[[], None]


@dataclass
class Machine:
    """Runs the streams of its devices.

    Args:
        seed: of the order in which they run.
    """

    seed: int = 0
    now: int = 0
    streams: list[deque[_Entry]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def step(self) -> bool:
        """Run one entry that can run; tell whether there was one."""
        for stream in self._random.sample(self.streams, len(self.streams)):
            if stream and stream[0].ready():
                self.now += 1
                stream.popleft().run()
                return True
        return False

    def look(self) -> None:
        """Run a few entries, or none."""
        for _ in range(self._random.randint(0, _MOST_STEPS)):
            self.step()


class EmulatedDevice(Device):
    """See `Device` and the module.

    Args:
        machine: that it is a part of.
        timeout_seconds: see `Device`.
        bus_id: see `Device`.
        capacity: bytes of its memory.

    Attributes:
        allocated, pinned_bytes: so far. events: made so far.
    """

    def __init__(
        self,
        machine: Machine | None = None,
        timeout_seconds: float = 20.0,
        bus_id: str = "0000:01:00.0",
        capacity: int = 1 << 30,
    ) -> None:
        super().__init__(timeout_seconds)
        self.machine = machine or Machine()
        self.name, self.bus_id, self.capacity = "GPU 0 (emulated)", bus_id, capacity
        self.allocated = self.pinned_bytes = self.events = 0
        self._tickets: dict[int, _Ticket] = {}
        self._streams: list[deque[_Entry]] = []
        self.compute = self.stream()

    def bind(self) -> None:
        pass

    def allocate(self, size: int) -> DeviceArray:
        if self.allocated + size > self.capacity:
            raise MemoryError(f"{self.name}: got a request for {size} bytes")
        self.allocated += size
        return np.full(size, 0xFF, np.uint8).view(DeviceArray)

    def pinned(self, size: int) -> Any:
        self.pinned_bytes += size
        return np.full(size, 0xFF, np.uint8)

    def owns(self, array: Any) -> bool:
        return isinstance(array, DeviceArray)

    def stream(self, *, urgent: bool = False) -> int:
        self._streams.append(deque())
        self.machine.streams.append(self._streams[-1])
        return len(self._streams) - 1

    def event(self, *, timed: bool = False) -> int:
        self.events += 1
        self._tickets[self.events] = _Ticket(0)
        return self.events

    def record(self, event: int, stream: int) -> None:
        ticket = self._tickets[event] = _Ticket()

        def reach() -> None:
            ticket.time = self.machine.now

        self.enqueue(stream, reach)

    def wait(self, stream: int, event: int) -> None:
        ticket = self._tickets[event]
        self.enqueue(stream, lambda: None, lambda: ticket.time is not None)

    def done(self, event: int) -> bool:
        self.machine.look()
        return self._tickets[event].time is not None

    def seconds(self, start: int, stop: int) -> float:
        times = self._tickets[start].time, self._tickets[stop].time
        assert times[0] is not None, "an event that is not done has no time"
        assert times[1] is not None, "an event that is not done has no time"
        return (times[1] - times[0]) * 1e-6

    def copy(self, target: Any, source: Any, stream: int) -> None:
        assert target.nbytes == source.nbytes
        assert self.owns(target) or self.owns(source)
        to, of = (flat_bytes(plain(array)) for array in (target, source))
        self.enqueue(stream, lambda: np.copyto(to, of))

    def memory(self) -> tuple[int, int]:
        return self.capacity - self.allocated, self.capacity

    def close(self) -> None:
        assert not any(self._streams), "nothing may be under way"

    def enqueue(
        self, stream: int, run: Callable[[], None], ready: Callable[[], bool] = lambda: True
    ) -> None:
        """Put work on a stream, to run in its turn and not before it is ready."""
        self._streams[stream].append(_Entry(ready, run))


class EmulatedCore:
    """The functions of a core of kernels for the CPU, on a device's stream.

    Args:
        core: `pympa._core`.
        device: whose arrays it gets.
    """

    answers = frozenset({"select_experts", "sort_rows", "count_experts", "drop_overflow"})
    """Functions that give the host something: it waits for all before them."""

    def __init__(self, core: Any, device: EmulatedDevice) -> None:
        self._core, self._device = core, device

    def Execution(self, kind: str, *, stream: int) -> Any:  # noqa: N802
        assert (kind, stream) == ("cuda", self._device.compute)
        return self._core.Execution(self._core.supported_isas()[0])

    def copy(self, *, source: Any, out: Any, on: Any) -> None:
        source, out = plain(source), plain(out)
        if hasattr(self._core, "copy"):
            self._device.enqueue(
                self._device.compute, lambda: self._core.copy(source=source, out=out, on=on)
            )
            return
        self._device.enqueue(self._device.compute, lambda: np.copyto(out, source))

    def __getattr__(self, name: str) -> Any:
        function, device = getattr(self._core, name), self._device
        if name.endswith("_bytes") or name == "Execution":
            return function

        def call(**arguments: Any) -> Any:
            if name in self.answers:
                device.synchronise(name)
                return function(**{key: plain(value) for key, value in arguments.items()})
            kept = {key: _kept(value) for key, value in arguments.items()}
            device.enqueue(device.compute, lambda: function(**kept))
            return None

        return call


class IdleCore(EmulatedCore):
    """Kernels that need the memory and the workspaces of a core, and do nothing with them.

    What a step of a dense model takes can be measured with them in no time.
    """

    def copy(self, *, source: Any, out: Any, on: Any) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name in self.answers:
            raise AttributeError(f"{name}: what it answers decides what a step takes")
        return getattr(self._core, name) if name.endswith("_bytes") else lambda **_: None


def _kept(value: Any) -> Any:
    """Return an argument as a kernel will see it: what is the host's, as it is now."""
    if isinstance(value, np.ndarray) and not isinstance(value, DeviceArray):
        return value.copy()
    return plain(value)
