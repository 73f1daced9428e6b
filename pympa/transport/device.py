"""Code that the endpoints of devices share: which messages are the device's, and deadlines.

Arrays of the host (counts, records, agreement) go through an inner endpoint, as on CPUs. They may
be sent and received before arrays of the device that were started earlier, so the two never use the
same channel. `wait` for arrays of the device blocks the stream of kernels and not the host, where
that is possible.
"""

from __future__ import annotations

import copy
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pympa.hardware.device import Device
from pympa.runtime.arena import Array
from pympa.runtime.trace import Seen
from pympa.transport.endpoint import Message, TransportError

if TYPE_CHECKING:
    from pympa.transport.mpi import MpiEndpoint

_SLEEP_SECONDS = 20e-6


@dataclass
class _Pending:
    """The messages of one `start`, on the host and on the device; None for no such messages."""

    host: Any
    device: Any
    peers: list[int]


class DeviceEndpoint(ABC):
    """One rank of a world in which some arrays are on devices.

    Args:
        inner: the endpoint for arrays of the host, which is closed with this one.
        device: the device of this rank.
        timeout_seconds: the longest time of a single wait.
        sleeps: whether ranks sleep between polls, because they share cores.
    """

    def __init__(
        self, inner: MpiEndpoint, device: Device, *, timeout_seconds: float, sleeps: bool
    ) -> None:
        self.rank, self.size = inner.rank, inner.size
        self.timeout_seconds = timeout_seconds
        self.sleeps = sleeps
        self._inner, self._device = inner, device
        device.watchers.append(self._watch)

    @abstractmethod
    def _start(self, sends: Sequence[Message], receives: Sequence[Message], seen: Seen) -> Any:
        """Start messages of arrays of the device, after its kernels so far."""

    @abstractmethod
    def _join(self, started: Any, peers: list[int], what: str) -> None:
        """Make later kernels wait until all messages of a `_start` are done."""

    @abstractmethod
    def _progress(self) -> bool:
        """Make progress on arrays of the device; return whether its streams wait for other ranks.

        Raises:
            TransportError: a message failed, or the streams have waited too long.
        """

    @abstractmethod
    def _shut(self) -> None:
        """Free everything that moves arrays of the device. Collective."""

    def start(self, sends: Sequence[Message], receives: Sequence[Message], seen: Seen) -> _Pending:
        """See `Endpoint.start`."""
        self.poll()
        everything = (*receives, *sends)
        at = {
            kind: [i for i, m in enumerate(everything) if self._device.owns(m.array) is kind]
            for kind in (False, True)
        }

        def begun(on_device: bool, start: Callable[..., Any]) -> Any:
            indices = at[on_device]

            def of_part(index: int, stream: int | None = None) -> None:
                seen(indices[index], stream)

            incoming = [everything[i] for i in indices if i < len(receives)]
            outgoing = [everything[i] for i in indices if i >= len(receives)]
            return start(outgoing, incoming, of_part) if indices else None

        peers = sorted({message.peer for message in everything})
        return _Pending(begun(False, self._inner.start), begun(True, self._start), peers)

    def wait(self, pending: _Pending, what: str) -> None:
        """Wait until arrays of the host are done, and make later kernels wait for the others.

        Raises:
            TransportError: the deadline passed, or a message had an unexpected size.
        """
        if pending.host is not None:
            self._until(lambda: self._inner.done(pending.host, what), pending.peers, what)
        if pending.device is not None:
            self._join(pending.device, pending.peers, what)

    def poll(self) -> None:
        """Let messages progress; raises if they no longer can."""
        self._inner.poll()
        self._progress()

    def reaches(self, ranks: Sequence[int]) -> bool:
        """Return False: no rank reads the memory of another rank's device."""
        return False

    def copy(self, target: Array, source: Array) -> None:
        """Copy between two arrays of this rank, in the order of its kernels."""
        if self._device.owns(target):
            self._device.copy(target, source, self._device.compute)
        else:
            np.copyto(target, source)

    def first(self, size: int, *, sleeps: bool) -> DeviceEndpoint:
        """See `MpiEndpoint.first`."""
        view = copy.copy(self)
        view._inner = self._inner.first(size, sleeps=sleeps)
        view.size, view.sleeps = size, sleeps
        return view

    def idle_barrier(self) -> None:
        """See `MpiEndpoint.idle_barrier`."""
        self._inner.idle_barrier()

    def close(self) -> None:
        """Free everything that moves messages; the device stays open. Collective."""
        self._device.watchers.remove(self._watch)
        self._shut()
        self._inner.close()

    def _watch(self) -> bool:
        self._inner.poll()
        return self._progress()

    def _until(self, done: Callable[[], bool], peers: Sequence[int], what: str) -> None:
        """Make progress on messages until `done` returns true or the deadline passes."""
        deadline = time.monotonic() + self.timeout_seconds
        while not done():
            self.poll()
            if time.monotonic() > deadline:
                raise self._late(peers, what)
            if self.sleeps:
                time.sleep(_SLEEP_SECONDS)
            else:
                os.sched_yield()

    def _late(self, peers: Sequence[int], what: str) -> TransportError:
        return TransportError(
            f"rank {self.rank} waited {self.timeout_seconds:g} s on {what} for messages "
            f"from or to ranks {list(peers)}; raise --timeout if the work takes longer"
        )
