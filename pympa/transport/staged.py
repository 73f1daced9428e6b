"""Messages between devices by MPI, in pieces through pinned host memory.

This is for ranks that share a GPU, which NCCL refuses, and for systems without NCCL. All messages
between two ranks in one direction over one channel form a lane, with its own stream and two pinned
buffers, so that one piece is copied while another is in MPI, and no lane waits for another. A
message ends with a piece that is shorter than the buffer, and may be empty, so both sides notice if
their sizes differ.

The host must make progress on pieces: `poll` does, and so does every wait of the host. `wait`
returns when MPI is done and every copy is on a stream; later kernels wait for the copies. The first
message makes a lane; a step that repeats an earlier one allocates nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pympa.hardware.device import Device
from pympa.runtime.trace import Seen
from pympa.transport.device import DeviceEndpoint
from pympa.transport.endpoint import CHANNELS, Message, raw_bytes

if TYPE_CHECKING:
    from pympa.transport.mpi import MpiEndpoint

PIECE_BYTES = 1 << 20  # 100 µs of MPI between processes of a node, five times the time of a copy
_BUFFERS = 2


class _Piece(NamedTuple):
    """Bytes on the device that one buffer can hold.

    Attributes:
        array: the bytes.
        ready: the event after which they may be used.
        end: a function of the lane's stream to call after the last piece; None for other pieces.
    """

    array: Any
    ready: int
    end: Callable[[int], None] | None


class _Buffer(NamedTuple):
    """Pinned memory, and the event of its last copy."""

    memory: NDArray[np.uint8]
    copied: int


class _Lane(ABC):
    """The messages of one channel to or from one peer, in order; see the module.

    Args:
        inner: the endpoint that sends and receives the pieces.
        device: the device that copies the pieces.
        peer: the rank of the other side.
        channel: the channel of the messages.
        piece_bytes: the bytes of a buffer.
    """

    def __init__(
        self, inner: MpiEndpoint, device: Device, peer: int, channel: int, piece_bytes: int
    ) -> None:
        self._inner, self._device = inner, device
        # Messages of the host have the lower channels: they may overtake pieces that wait.
        self._peer, self._channel = peer, len(CHANNELS) + channel
        self._axis, self._piece_bytes = CHANNELS[channel], piece_bytes
        self.stream = device.stream(urgent=True)
        self._free = [_Buffer(device.pinned(piece_bytes), device.event()) for _ in range(_BUFFERS)]
        self._waiting: deque[_Piece] = deque()
        self._copying: deque[tuple[_Piece, _Buffer]] = deque()
        self._travelling: deque[tuple[_Piece, _Buffer, Any]] = deque()

    def add(self, array: Any, ready: int, end: Callable[[int], None]) -> None:
        """Add a message.

        Args:
            array: the array on the device.
            ready: the event after which it may be used.
            end: a function to call with the lane's stream when MPI is done and all copies are on
                it.
        """
        raw, size = raw_bytes(array), self._piece_bytes
        starts = range(0, len(raw) + 1, size)
        for start in starts:
            last = start == starts[-1]
            self._waiting.append(_Piece(raw[start : start + size], ready, end if last else None))

    @abstractmethod
    def progress(self) -> None:
        """Make as much progress on pieces as possible."""

    @property
    def idle(self) -> bool:
        """Whether no piece is waiting or in flight."""
        return not (self._waiting or self._copying or self._travelling)

    def _copy(self, piece: _Piece, buffer: _Buffer, *, inward: bool) -> None:
        host = buffer.memory[: piece.array.nbytes]
        target, source = (piece.array, host) if inward else (host, piece.array)
        self._device.wait(self.stream, piece.ready)
        self._device.copy(target, source, self.stream)
        self._device.record(buffer.copied, self.stream)
        self._copying.append((piece, buffer))

    def _travel(self, piece: _Piece, buffer: _Buffer, *, inward: bool) -> None:
        message = Message(buffer.memory[: piece.array.nbytes], self._peer, self._channel)
        sends, receives = ([], [message]) if inward else ([message], [])
        self._travelling.append((piece, buffer, self._inner.start(sends, receives, _ignore)))

    def _next_copied(self) -> tuple[_Piece, _Buffer] | None:
        if self._copying and self._device.done(self._copying[0][1].copied):
            return self._copying.popleft()
        return None

    def _next_arrived(self) -> tuple[_Piece, _Buffer] | None:
        if self._travelling and self._inner.done(self._travelling[0][2], self._axis):
            return self._travelling.popleft()[:2]
        return None


class _SendLane(_Lane):
    def progress(self) -> None:
        while arrived := self._next_arrived():
            piece, buffer = arrived
            self._free.append(buffer)
            if piece.end is not None:
                piece.end(self.stream)
        while copied := self._next_copied():
            self._travel(*copied, inward=False)
        while self._free and self._waiting:
            self._copy(self._waiting.popleft(), self._free.pop(), inward=False)


class _ReceiveLane(_Lane):
    def progress(self) -> None:
        while copied := self._next_copied():
            self._free.append(copied[1])
        while arrived := self._next_arrived():
            self._copy(*arrived, inward=True)
            if arrived[0].end is not None:
                arrived[0].end(self.stream)
        while self._free and self._waiting:
            self._travel(self._waiting.popleft(), self._free.pop(), inward=True)


class _Started:
    """The messages of one `start`: the number not done, and the events after the others."""

    def __init__(self, ready: int, messages: int) -> None:
        self.ready = ready
        self.left = messages
        self.ends: list[int] = []


class StagedEndpoint(DeviceEndpoint):
    """See `DeviceEndpoint`.

    Args:
        inner: the endpoint for all messages.
        device: the device of this rank.
        timeout_seconds: the longest time of a single wait.
        sleeps: whether ranks sleep between polls.
        piece_bytes: the bytes of a piece.
    """

    def __init__(
        self,
        inner: MpiEndpoint,
        device: Device,
        *,
        timeout_seconds: float,
        sleeps: bool,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        super().__init__(inner, device, timeout_seconds=timeout_seconds, sleeps=sleeps)
        self._piece_bytes = piece_bytes
        self._lanes: dict[tuple[bool, int, int], _Lane] = {}

    def _start(self, sends: Sequence[Message], receives: Sequence[Message], seen: Seen) -> _Started:
        device = self._device
        started = _Started(device.take_event(), len(receives) + len(sends))
        device.record(started.ready, device.compute)

        def end(index: int, stream: int) -> None:
            seen(index, stream)
            started.left -= 1
            started.ends.append(device.take_event())
            device.record(started.ends[-1], stream)

        for index, message in enumerate((*receives, *sends)):
            received = index < len(receives)
            lane = self._lane(received, message.peer, message.channel)
            lane.add(message.array, started.ready, partial(end, index))
            lane.progress()
        return started

    def _join(self, started: _Started, peers: list[int], what: str) -> None:
        """Wait for MPI on the host, then make kernels wait for the copies to the device."""
        self._until(lambda: not started.left, peers, what)
        for event in started.ends:
            self._device.wait(self._device.compute, event)
            self._device.give_event(event)
        self._device.give_event(started.ready)

    def _progress(self) -> bool:
        for lane in self._lanes.values():
            if not lane.idle:
                lane.progress()
        return False  # streams wait for nothing that has not arrived

    def _shut(self) -> None:
        """Do nothing: lanes are empty after the last `wait`, and their memory is the device's."""

    def _lane(self, received: bool, peer: int, channel: int) -> _Lane:
        key = received, peer, channel
        if key not in self._lanes:
            kind = _ReceiveLane if received else _SendLane
            self._lanes[key] = kind(self._inner, self._device, peer, channel, self._piece_bytes)
        return self._lanes[key]


def _ignore(index: int, stream: int | None = None) -> None:
    """Ignore the end of a piece: only whole messages are seen."""
