"""NCCL between rank threads on emulated devices: what it demands is checked, what it moves moves.

A group comes to its turn on its stream, and then its receives are filled with rubbish; a message is
copied when the groups of both ranks have come to theirs, and a group is done with its last message.
So buffers that are read too soon, or used again too soon, show as wrong results.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pympa.transport.nccl import NcclError
from support.emulated import EmulatedDevice, plain


@dataclass
class _Side:
    """One rank's end of a message."""

    memory: np.ndarray
    done: bool = False


@dataclass
class Fabric:
    """What all ranks share.

    Attributes:
        error: what `check` raises. stuck: `connect` never returns, as where a rank has died.
    """

    error: str | None = None
    stuck: bool = False
    names: int = 0
    sends: defaultdict[Any, deque[_Side]] = field(default_factory=lambda: defaultdict(deque))
    receives: defaultdict[Any, deque[_Side]] = field(default_factory=lambda: defaultdict(deque))

    def meet(self, key: tuple[bytes, int, int]) -> None:
        """Move messages of which both sides are there."""
        sends, receives = self.sends[key], self.receives[key]
        while sends and receives:
            source, target = sends.popleft(), receives.popleft()
            if source.memory.size != target.memory.size:
                self.error = (
                    f"rank {key[2]} expected {target.memory.size} bytes from rank {key[1]}; "
                    f"got {source.memory.size}"
                )
                return
            target.memory[:] = source.memory
            source.done = target.done = True


class FakeNccl:
    """See `pympa.transport.nccl.Nccl`."""

    version = "2.99.0"

    def __init__(self, fabric: Fabric, device: EmulatedDevice) -> None:
        self._fabric, self._device = fabric, device

    def unique_id(self) -> bytes:
        self._fabric.names += 1
        return bytes([self._fabric.names])

    def connect(self, size: int, unique_id: bytes, rank: int) -> FakeCommunicator:
        if self._fabric.stuck:
            threading.Event().wait()
        return FakeCommunicator(self._fabric, self._device, unique_id, rank, size)


class FakeCommunicator:
    """See `pympa.transport.nccl.Communicator`."""

    def __init__(
        self, fabric: Fabric, device: EmulatedDevice, name: bytes, rank: int, size: int
    ) -> None:
        self._fabric, self._device = fabric, device
        self._name, self._rank, self._size = name, rank, size
        self._stream: int | None = None
        self.aborted = self.destroyed = False
        self.groups = 0

    def exchange(self, sends: Any, receives: Any, stream: int) -> None:
        assert not self.aborted
        assert not self.destroyed
        assert sends or receives, "a group without messages"
        assert stream != self._device.compute, "kernels would wait for messages"
        assert self._stream in (None, stream), "groups of a communicator share a stream"
        self._stream, self.groups = stream, self.groups + 1
        for array, peer in (*sends, *receives):
            assert self._device.owns(array)
            assert array.dtype == np.uint8
            assert array.size
            assert peer in range(self._size)
            assert peer != self._rank
        outgoing = [(_Side(plain(array)), peer) for array, peer in sends]
        incoming = [(_Side(plain(array)), peer) for array, peer in receives]
        arrived: list[bool] = []

        def done() -> bool:
            if not arrived:
                arrived.append(True)
                for side, peer in incoming:
                    side.memory[:] = 0xFF
                    self._fabric.receives[self._name, peer, self._rank].append(side)
                for side, peer in outgoing:
                    self._fabric.sends[self._name, self._rank, peer].append(side)
            for _, peer in outgoing:
                self._fabric.meet((self._name, self._rank, peer))
            for _, peer in incoming:
                self._fabric.meet((self._name, peer, self._rank))
            return self.aborted or all(side.done for side, _ in (*outgoing, *incoming))

        self._device.enqueue(stream, lambda: None, done)

    def check(self) -> None:
        if self._fabric.error is not None:
            raise NcclError(self._fabric.error)

    def abort(self) -> None:
        self.aborted = True

    def destroy(self) -> None:
        self.destroyed = True
