"""What the endpoints of devices have in common: which messages are the device's, and deadlines.

Arrays of the host (counts, records, agreement) go through an inner endpoint, as on CPUs; they may
be sent and received before those of the device that were started earlier, which is why the two
never share a channel. `wait` for arrays of the device lets the stream of kernels wait and not the
host, wherever that can be.
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

from pympa.arena import Array
from pympa.device import Device
from pympa.trace import Seen
from pympa.transport import Message, TransportError

if TYPE_CHECKING:
    from pympa.transport.mpi import MpiEndpoint

_NAP_SECONDS = 20e-6


@dataclass
class _Pending:
    """Messages of one `start`: those of the host, those of the device, or None for no such."""

    host: Any
    device: Any
    peers: list[int]


class DeviceEndpoint(ABC):
    """One rank of a world in which some arrays are on devices.

    Args:
        inner: for arrays of the host; is closed with this one.
        device: this rank's.
        timeout_seconds: longest time any single wait may take.
        naps: sleep between looks; for ranks that share cores.
    """

    def __init__(
        self, inner: MpiEndpoint, device: Device, *, timeout_seconds: float, naps: bool
    ) -> None:
        self.rank, self.size = inner.rank, inner.size
        self.timeout_seconds = timeout_seconds
        self.naps = naps
        self._inner, self._device = inner, device
        device.watchers.append(self._watch)

    @abstractmethod
    def _start(self, sends: Sequence[Message], receives: Sequence[Message], seen: Seen) -> Any:
        """Begin moving arrays of the device, once its kernels so far are done."""

    @abstractmethod
    def _join(self, started: Any, peers: list[int], what: str) -> None:
        """Let kernels from now on wait until all that `_start` began is done."""

    @abstractmethod
    def _move_on(self) -> bool:
        """Look after arrays of the device under way; tell whether its streams wait for others.

        Raises:
            TransportError: something failed, or the streams have waited too long.
        """

    @abstractmethod
    def _shut(self) -> None:
        """Let go of what moves arrays of the device. Collective."""

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
        """Return when arrays of the host are here, and kernels from now on wait for the others.

        Raises:
            TransportError: the deadline passed, or a message had another size than expected.
        """
        if pending.host is not None:
            self._until(lambda: self._inner.done(pending.host, what), pending.peers, what)
        if pending.device is not None:
            self._join(pending.device, pending.peers, what)

    def poll(self) -> None:
        """Let messages move on; ends the rank where they no longer can."""
        self._inner.poll()
        self._move_on()

    def reaches(self, ranks: Sequence[int]) -> bool:
        """Tell that no rank reads the memory of another's device."""
        return False

    def copy(self, target: Array, source: Array) -> None:
        """Copy between two arrays of this rank, in the order of its kernels."""
        if self._device.owns(target):
            self._device.copy(target, source, self._device.compute)
        else:
            np.copyto(target, source)

    def first(self, size: int, *, naps: bool) -> DeviceEndpoint:
        """See `MpiEndpoint.first`."""
        view = copy.copy(self)
        view._inner = self._inner.first(size, naps=naps)
        view.size, view.naps = size, naps
        return view

    def rest(self) -> None:
        """See `MpiEndpoint.rest`."""
        self._inner.rest()

    def close(self) -> None:
        """Free all that moves messages; the device stays. Collective."""
        self._device.watchers.remove(self._watch)
        self._shut()
        self._inner.close()

    def _watch(self) -> bool:
        self._inner.poll()
        return self._move_on()

    def _until(self, done: Callable[[], bool], peers: Sequence[int], what: str) -> None:
        """Look after messages until something is done, or it is too late."""
        deadline = time.monotonic() + self.timeout_seconds
        while not done():
            self.poll()
            if time.monotonic() > deadline:
                raise self._late(peers, what)
            if self.naps:
                time.sleep(_NAP_SECONDS)
            else:
                os.sched_yield()

    def _late(self, peers: Sequence[int], what: str) -> TransportError:
        return TransportError(
            f"rank {self.rank} waited {self.timeout_seconds:g} s on {what} for messages "
            f"from or to ranks {list(peers)}; raise --timeout if the work takes longer"
        )
