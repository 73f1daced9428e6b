"""Messages between devices by MPI, which sees the host only: in pieces through pinned memory.

For ranks that share a GPU, which NCCL refuses, and where there is no NCCL. All messages between two
ranks in one direction over one channel form a lane: a stream of its own and two pinned buffers, so
that one piece is copied while another is in MPI, and no lane waits for another. A message ends with
a piece that is shorter than the buffer, empty if need be, so both sides notice if they disagree
about its size.

The host has to move pieces on: `poll` does, and so does every wait of the host. `wait` returns when
MPI is through and every copy is on a stream; kernels after it wait for the copies. Lanes are made
by the first message; a step that repeats an earlier one takes no memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pympa.device import Device
from pympa.trace import Seen
from pympa.transport import CHANNELS, Message, raw_bytes
from pympa.transport.device import DeviceEndpoint

if TYPE_CHECKING:
    from pympa.transport.mpi import MpiEndpoint

PIECE_BYTES = 1 << 20  # 100 µs of MPI between processes of a node, five times what a copy takes
_BUFFERS = 2


class _Piece(NamedTuple):
    """Bytes on the device, the event after which they may be touched, and what to call at the end.

    end: of the last piece of a message, gets the lane's stream; None for the others.
    """

    array: Any
    ready: int
    end: Callable[[int], None] | None


class _Buffer(NamedTuple):
    """Pinned memory, and the event of its last copy."""

    memory: NDArray[np.uint8]
    copied: int


class _Lane(ABC):
    """Messages of one channel to or from one peer, in order; see the module.

    Args:
        inner: moves the pieces. device: copies them.
        peer, channel: of the messages.
        piece_bytes: of a buffer.
    """

    def __init__(
        self, inner: MpiEndpoint, device: Device, peer: int, channel: int, piece_bytes: int
    ) -> None:
        self._inner, self._device = inner, device
        # Messages of the host have the lower channels: they may overtake pieces that wait here.
        self._peer, self._channel = peer, len(CHANNELS) + channel
        self._axis, self._piece_bytes = CHANNELS[channel], piece_bytes
        self.stream = device.stream(urgent=True)
        self._free = [_Buffer(device.pinned(piece_bytes), device.event()) for _ in range(_BUFFERS)]
        self._waiting: deque[_Piece] = deque()
        self._copying: deque[tuple[_Piece, _Buffer]] = deque()
        self._travelling: deque[tuple[_Piece, _Buffer, Any]] = deque()

    def add(self, array: Any, ready: int, end: Callable[[int], None]) -> None:
        """Take a message.

        Args:
            array: on the device.
            ready: event after which it may be touched.
            end: called with the lane's stream once MPI is through and all copies are on it.
        """
        raw, size = raw_bytes(array), self._piece_bytes
        starts = range(0, len(raw) + 1, size)
        for start in starts:
            last = start == starts[-1]
            self._waiting.append(_Piece(raw[start : start + size], ready, end if last else None))

    @abstractmethod
    def move_on(self) -> None:
        """Take pieces as far as they can go."""

    @property
    def idle(self) -> bool:
        """Whether no piece is left."""
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
        self._travelling.append((piece, buffer, self._inner.start(sends, receives, _overlook)))

    def _next_copied(self) -> tuple[_Piece, _Buffer] | None:
        if self._copying and self._device.done(self._copying[0][1].copied):
            return self._copying.popleft()
        return None

    def _next_arrived(self) -> tuple[_Piece, _Buffer] | None:
        if self._travelling and self._inner.done(self._travelling[0][2], self._axis):
            return self._travelling.popleft()[:2]
        return None


class _SendLane(_Lane):
    def move_on(self) -> None:
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
    def move_on(self) -> None:
        while copied := self._next_copied():
            self._free.append(copied[1])
        while arrived := self._next_arrived():
            self._copy(*arrived, inward=True)
            if arrived[0].end is not None:
                arrived[0].end(self.stream)
        while self._free and self._waiting:
            self._travel(self._waiting.popleft(), self._free.pop(), inward=True)


class _Started:
    """Messages of one `start`: how many are left, and events after those that are not."""

    def __init__(self, ready: int, messages: int) -> None:
        self.ready = ready
        self.left = messages
        self.ends: list[int] = []


class StagedEndpoint(DeviceEndpoint):
    """See `DeviceEndpoint`.

    Args:
        inner: moves all messages. device: this rank's.
        timeout_seconds: longest time any single wait may take.
        naps: sleep between looks.
        piece_bytes: that travel at a time.
    """

    def __init__(
        self,
        inner: MpiEndpoint,
        device: Device,
        *,
        timeout_seconds: float,
        naps: bool,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        super().__init__(inner, device, timeout_seconds=timeout_seconds, naps=naps)
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
            lane.move_on()
        return started

    def _join(self, started: _Started, peers: list[int], what: str) -> None:
        """Wait for MPI on the host; then let kernels wait for the copies to the device."""
        self._until(lambda: not started.left, peers, what)
        for event in started.ends:
            self._device.wait(self._device.compute, event)
            self._device.give_event(event)
        self._device.give_event(started.ready)

    def _move_on(self) -> bool:
        for lane in self._lanes.values():
            if not lane.idle:
                lane.move_on()
        return False  # streams get nothing that has yet to arrive

    def _shut(self) -> None:
        """Do nothing: lanes are empty after the last `wait`, and their memory is the device's."""

    def _lane(self, received: bool, peer: int, channel: int) -> _Lane:
        key = received, peer, channel
        if key not in self._lanes:
            kind = _ReceiveLane if received else _SendLane
            self._lanes[key] = kind(self._inner, self._device, peer, channel, self._piece_bytes)
        return self._lanes[key]


def _overlook(index: int, stream: int | None = None) -> None:
    """Take no note of a piece: whole messages are seen."""
