"""Messages between devices by NCCL, with one group of sends and receives for each `start`.

A group runs on its own stream, after the kernels before `start`; `wait` makes the kernels after it
wait for the group. The host never waits, so it runs ahead of the device. It must still enforce the
deadline: each `poll`, which every wait of the host calls, checks NCCL for errors, finds groups
whose peers are late, and aborts.

**Order.** NCCL matches the sends and receives of two ranks in the order in which each rank issued
them, and runs the groups of a communicator one after the other. So both sides of a pair must issue
in the same order, and no ranks may wait for each other in a cycle. Strategies ensure that. All axes
but `pp` are collective, so the ranks of an axis start the same messages in the same order. Stage s
of `pp` receives micro-batch i + 1 before it computes and sends i. Give receive i the time 2i + 3s,
messages inside computing i the time 2i + 3s + 2.5, and send i the time 2i + 3s + 3, which is also
the time of receive i on stage s + 1. Every rank starts its messages in the order of these times,
and both sides of a message have the same time. So the earliest group that is not done can always
run, even if a device ran the groups of a rank one after the other, or if the host waited for the
device, as it does where CUDA loads a kernel at its first call. Lanes are for overlap, not for
safety: `pp` and the ring have messages in flight while others start theirs, so each has its own
communicator and stream.

Devices that communicate for the first time connect inside the call that issues the group, in which
the host waits for its peer. Such calls, and the very first one, run on a thread with a deadline.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from pympa.hardware.device import Device, flat_bytes
from pympa.runtime.arena import Array
from pympa.runtime.trace import Seen
from pympa.transport import world_transport
from pympa.transport.device import DeviceEndpoint
from pympa.transport.endpoint import CHANNELS, Message, TransportError

if TYPE_CHECKING:
    from pympa.transport.mpi import MpiEndpoint

T = TypeVar("T")

_LANES = {"pp": 0, "cp": 1, "ulysses": 1}
_OTHER_LANE = 2  # tensor, grid and expert parallelism, which never have messages in flight together


class NcclError(RuntimeError):
    """An error that NCCL reports."""


class Communicator(Protocol):
    """Ranks that NCCL has connected; their numbers are those of the world."""

    def exchange(
        self, sends: Sequence[tuple[Array, int]], receives: Sequence[tuple[Array, int]], stream: int
    ) -> None:
        """Put one group of (bytes, rank) on a stream. Raises NcclError."""

    def check(self) -> None:
        """Raise NcclError if an error occurred since the last call."""

    def abort(self) -> None:
        """End all messages in flight, on this rank alone."""

    def destroy(self) -> None:
        """Free the communicator; no messages may be in flight."""


class Nccl(Protocol):
    """The NCCL library."""

    version: str

    def unique_id(self) -> bytes:
        """Return a name for a communicator; one rank makes it and all use it."""

    def connect(self, size: int, unique_id: bytes, rank: int) -> Communicator:
        """Return a communicator of `size` ranks. Collective. Raises NcclError."""


@dataclass
class _Group:
    """The messages of one `start`, with the events of their start and their end."""

    ready: int
    done: int
    peers: list[int]
    what: str
    since: float | None = None  # the host's time when it was first seen to be ready
    finished: bool = False


@dataclass
class _Lane:
    """A communicator, its stream, its groups, and its connections by (is a receive, peer)."""

    communicator: Communicator
    stream: int
    groups: deque[_Group]
    connected: set[tuple[bool, int]]


class NcclEndpoint(DeviceEndpoint):
    """See `DeviceEndpoint`. Collective to make.

    Args:
        inner: the endpoint for arrays of the host.
        device: the device of this rank.
        nccl: the library.
        timeout_seconds: the longest time of messages after all work before them is done.
        sleeps: whether ranks sleep between polls.
    """

    def __init__(
        self,
        inner: MpiEndpoint,
        device: Device,
        nccl: Nccl,
        *,
        timeout_seconds: float,
        sleeps: bool,
    ) -> None:
        super().__init__(inner, device, timeout_seconds=timeout_seconds, sleeps=sleeps)
        world = world_transport(inner)
        lanes = range(1 + _OTHER_LANE)
        names = [nccl.unique_id() for _ in lanes] if self.rank == 0 else []
        self._lanes: list[_Lane] = []
        everyone = range(self.size)
        for name in world.gather_objects(names)[0]:
            connect = partial(nccl.connect, self.size, name, self.rank)
            try:
                communicator = self._within_deadline(connect, everyone, "a communicator")
            except NcclError as error:
                raise self._failure(error, everyone, "a communicator") from None
            self._lanes.append(_Lane(communicator, device.stream(urgent=True), deque(), set()))

    def abort(self) -> None:
        """End all messages of the device, on this rank alone."""
        for lane in self._lanes:
            lane.communicator.abort()
            lane.groups.clear()

    def _start(self, sends: Sequence[Message], receives: Sequence[Message], seen: Seen) -> _Group:
        device = self._device
        what = CHANNELS[(*receives, *sends)[0].channel]
        lane = self._lanes[_LANES.get(what, _OTHER_LANE)]
        peers = sorted({message.peer for message in (*receives, *sends)})
        needed = {(True, m.peer) for m in receives} | {(False, m.peer) for m in sends}
        group = _Group(device.take_event(), device.take_event(), peers, what)
        device.record(group.ready, device.compute)
        device.wait(lane.stream, group.ready)

        def exchange() -> None:
            lane.communicator.exchange(
                [(flat_bytes(m.array), m.peer) for m in sends],
                [(flat_bytes(m.array), m.peer) for m in receives],
                lane.stream,
            )

        try:
            if needed <= lane.connected:
                exchange()
            else:
                self._within_deadline(exchange, peers, what)
                lane.connected |= needed
        except NcclError as error:
            raise self._failure(error, peers, what) from None
        for index in range(len(receives) + len(sends)):
            seen(index, lane.stream)
        device.record(group.done, lane.stream)
        lane.groups.append(group)
        return group

    def _join(self, started: _Group, peers: list[int], what: str) -> None:
        if not started.finished:
            self._device.wait(self._device.compute, started.done)

    def _progress(self) -> bool:
        for lane in self._lanes:
            while lane.groups and self._device.done(lane.groups[0].done):
                group = lane.groups.popleft()
                group.finished = True
                self._device.give_event(group.ready)
                self._device.give_event(group.done)
            if lane.groups:
                self._check(lane.communicator, lane.groups[0])
        return any(lane.groups and lane.groups[0].since is not None for lane in self._lanes)

    def _check(self, communicator: Communicator, group: _Group) -> None:
        try:
            communicator.check()
        except NcclError as error:
            raise self._failure(error, group.peers, group.what) from None
        now = time.monotonic()
        if group.since is None:
            group.since = now if self._device.done(group.ready) else None
        elif now - group.since > self.timeout_seconds:
            self.abort()
            raise self._late(group.peers, group.what)

    def _shut(self) -> None:
        for lane in self._lanes:
            if lane.groups:
                last = lane.groups[-1]
                self._until(partial(getattr, last, "finished"), last.peers, last.what)
            lane.communicator.destroy()

    def _failure(self, error: NcclError, peers: Sequence[int], what: str) -> TransportError:
        self.abort()
        return TransportError(
            f"rank {self.rank}: NCCL failed on {what} with ranks {list(peers)}: {error}"
        )

    def _within_deadline(self, work: Callable[[], T], peers: Sequence[int], what: str) -> T:
        """Return the result of `work`, which waits for other ranks."""
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                self._device.bind()
                results.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(self.timeout_seconds)
        if errors:
            raise errors[0]
        if not results:
            self.abort()
            raise self._late(peers, what)
        return results[0]
