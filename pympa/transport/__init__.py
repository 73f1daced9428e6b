"""Communication with the other ranks of one mesh axis.

An `Endpoint` moves bytes between ranks: over MPI (`mpi.py`), between threads of one process
(`local.py`), between devices (`nccl.py`, `staged.py`), or nowhere (`NullEndpoint`). `Transport` is
(`local.py`), between devices (`nccl.py`, `staged.py`), or nowhere (`NullEndpoint`). Strategies use
`Transport`: peers are indices along its axis, collectives are built from point-to-point messages,
bytes are counted by axis and pair, waiting and messages in flight are traced. All endpoints use the
same implementation of the collectives, so all count the same bytes.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pympa.plan.mesh import Mesh
from pympa.runtime.arena import Arena, Array, SharedAddress
from pympa.runtime.trace import Trace
from pympa.runtime.traffic import Traffic
from pympa.transport.endpoint import CHANNELS, WORLD, Endpoint, Message
from pympa.transport.shared import Shape, SharedMemory


class Exposure(NamedTuple):
    """Arrays that ranks let each other read, and the messages with their addresses.

    Attributes:
        arrays: the arrays of this rank.
        shapes: the shapes of the arrays of each rank.
        addresses: the addresses, int64 `[ranks, arrays, 4]`.
        pending: the messages in flight.
    """

    arrays: list[Array]
    shapes: list[list[Shape]]
    addresses: NDArray[np.int64]
    pending: Any


class Transport:
    """The ranks along one axis of the mesh, seen from one of them.

    Args:
        endpoint: the endpoint of this rank.
        axis: the name of the axis, for counting, tracing and messages.
        ranks: the world ranks along the axis, in order, with `endpoint.rank`.
        arena: the arena for buffers of messages.
        trace: the trace of waiting and of messages in flight.
        traffic: the counters of bytes.

    Attributes:
        shares_memory: whether the ranks can read each other's shared arrays.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        axis: str,
        ranks: Sequence[int],
        arena: Arena,
        trace: Trace,
        traffic: Traffic,
    ) -> None:
        self.axis = axis
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.index = self.ranks.index(endpoint.rank)
        self._others = [i for i in range(self.size) if i != self.index]
        self._endpoint = endpoint
        self._arena = arena
        self._trace = trace
        self._traffic = traffic
        self.shares_memory = self.size > 1 and endpoint.reaches(self.ranks)
        self._memory = SharedMemory()
        self._readers: list[Any] = []  # messages about finished reading
        self._channel = CHANNELS.index(axis)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any] | type[Any]) -> Array:
        """Return an array for messages, from the arena."""
        return self._arena.empty(shape, dtype, "messages")

    def start(
        self, sends: Sequence[tuple[Array, int]], receives: Sequence[tuple[Array, int]]
    ) -> Any:
        """Start sending (array, to index) and receiving (array, from index); see `Endpoint`.

        Empty arrays are skipped: both sides know their size. Messages of a rank to itself are
        copied at once and not counted.
        """
        return self._start(sends, receives, counts=self.axis != WORLD)

    def _start_uncounted(
        self, sends: Sequence[tuple[Array, int]], receives: Sequence[tuple[Array, int]]
    ) -> Any:
        return self._start(sends, receives, counts=False)

    def _start(
        self,
        sends: Sequence[tuple[Array, int]],
        receives: Sequence[tuple[Array, int]],
        *,
        counts: bool,
    ) -> Any:
        outgoing = self._messages(sends)
        incoming = self._messages(receives)
        own = [[a for a, i in side if i == self.index and a.size] for side in (receives, sends)]
        for target, source in zip(*own, strict=True):
            self._endpoint.copy(target, source)
        if counts:
            for message in outgoing:
                self._traffic.sent[self.axis, message.peer] += message.array.nbytes
            for message in incoming:
                self._traffic.received[self.axis, message.peer] += message.array.nbytes
        seen = self._trace.post(self.axis, incoming, outgoing) if counts else _ignore
        return self._endpoint.start(outgoing, incoming, seen)

    def wait(self, pending: Any) -> None:
        """Wait until all messages of a `start` are done."""
        with self._trace.span("wait", self.axis):
            self._endpoint.wait(pending, self.axis)

    def poll(self) -> None:
        """Let messages progress while this rank computes."""
        self._endpoint.poll()

    def expose(self, arrays: Sequence[Array], shapes: Sequence[Sequence[Shape]]) -> Exposure:
        """Let all ranks read `arrays`, which are in shared memory. Collective.

        Args:
            arrays: the arrays of this rank, which must not change until `wait_for_readers`.
            shapes: the shapes of the arrays of each rank.
        """
        fields = len(SharedAddress._fields)
        addresses = np.zeros((self.size, len(arrays), fields), np.int64)
        if not self._arena.dry:
            addresses[self.index] = [self._arena.shared_address(array) for array in arrays]
        others, own = self._others, addresses[self.index]
        pending = self._start_uncounted(
            [(own, i) for i in others], [(addresses[i], i) for i in others]
        )
        return Exposure(list(arrays), [*map(list, shapes)], addresses, pending)

    def exposed_arrays(self, exposure: Exposure) -> list[list[Array]]:
        """Return the exposed arrays of each rank, read-only. Collective."""
        self.wait(exposure.pending)
        found = []
        for rank, shapes in enumerate(exposure.shapes):
            dtypes = [array.dtype for array in exposure.arrays]
            if rank == self.index:
                found.append(exposure.arrays)
            elif self._arena.dry:
                both = zip(shapes, dtypes, strict=True)
                found.append([np.broadcast_to(np.zeros((), dtype), shape) for shape, dtype in both])
            else:
                numbers = exposure.addresses[rank].tolist()
                addresses = [SharedAddress(*address) for address in numbers]
                parts = zip(addresses, shapes, dtypes, strict=True)
                found.append([self._memory.view(*part) for part in parts])
        return found

    def end_reading(self, bytes_read: Sequence[int]) -> None:
        """Send to all ranks that this one has read their exposed arrays. Collective.

        Args:
            bytes_read: the bytes that were read in the arrays of each rank, for the counters.
        """
        for rank, count in zip(self.ranks, bytes_read, strict=True):
            if count:
                self._traffic.read[self.axis, rank] += count
        done, received = np.zeros(self.size, np.uint8), np.zeros(self.size, np.uint8)
        self._readers.append(
            self._start_uncounted(
                [(done[i : i + 1], i) for i in self._others],
                [(received[i : i + 1], i) for i in self._others],
            )
        )

    def wait_for_readers(self) -> None:
        """Wait until all ranks have read the arrays that this one exposed."""
        while self._readers:
            self.wait(self._readers.pop())

    def all_gather(self, parts: Sequence[Array]) -> None:
        """Receive the other ranks' parts; `parts[self.index]` is this rank's own. Collective."""
        mine, others = parts[self.index], self._others
        self.wait(self.start([(mine, i) for i in others], [(parts[i], i) for i in others]))

    def all_to_all(self, sends: Sequence[Array], receives: Sequence[Array]) -> None:
        """Send `sends[i]` to rank i and receive `receives[i]` from it. Collective."""
        peers = range(self.size)
        outgoing, incoming = zip(sends, peers, strict=True), zip(receives, peers, strict=True)
        self.wait(self.start([*outgoing], [*incoming]))

    def broadcast(self, array: Array, root: int) -> None:
        """Copy `array` of index `root` to all ranks. Collective."""
        if self.index == root:
            others = [i for i in range(self.size) if i != root]
            self.wait(self.start([(array, i) for i in others], []))
        else:
            self.wait(self.start([], [(array, root)]))

    def exchange_counts(self, counts: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """Send `counts[i]` to rank i and return the counts received from each. Collective.

        A rank sends arrays of the same shape to all ranks. If arrays are only shapes, nothing is
        sent, and the other ranks are assumed to send the same counts as this rank.
        """
        received = [counts[self.index].copy() for _ in counts]
        self.all_to_all(counts, received)
        return received

    def _messages(self, parts: Sequence[tuple[Array, int]]) -> list[Message]:
        """Return the messages, without empty arrays and those of this rank for itself."""
        return [
            Message(array, self.ranks[peer], self._channel)
            for array, peer in parts
            if array.size and peer != self.index
        ]

    def gather_objects(self, value: Any, root: int | None = None) -> list[Any]:
        """Return every rank's picklable value, in order. Collective.

        Args:
            value: the value of this rank.
            root: the only index that receives them (others return an empty list); None means all.
        """
        payload = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.zeros(self.size, np.int64)
        sizes[self.index] = payload.size
        self.all_gather([sizes[i : i + 1] for i in range(self.size)])
        if root is not None and self.index != root:
            self.wait(self.start([(payload, root)], []))
            return []
        parts = [np.empty(size, np.uint8) for size in sizes]
        parts[self.index] = payload
        if root is None:
            self.all_gather(parts)
        else:
            others = [i for i in range(self.size) if i != root]
            self.wait(self.start([], [(parts[i], i) for i in others]))
        return [pickle.loads(part.tobytes()) for part in parts]


def _ignore(index: int, stream: int | None = None) -> None:
    """Ignore the end of a message."""


def axis_transports(
    endpoint: Endpoint, mesh: Mesh, arena: Arena, trace: Trace, traffic: Traffic
) -> dict[str, Transport]:
    """Return the transports of a rank, by name.

    pp, cp, dim, ep, etp and ulysses are groups of the mesh. tp spans the `columns`, because it sums
    over tp·dim. ring is a part of cp, and its bytes count as cp.
    """
    groups = {name: (name, name) for name in ("pp", "cp", "dim", "ep", "etp", "ulysses")}
    groups |= {"tp": ("tp", "columns"), "ring": ("cp", "ring")}
    return {
        name: Transport(endpoint, axis, mesh.group(group), arena, trace, traffic)
        for name, (axis, group) in groups.items()
    }


def world_transport(endpoint: Endpoint) -> Transport:
    """Return the transport between all ranks, whose bytes are not counted."""
    return Transport(endpoint, WORLD, range(endpoint.size), Arena(), Trace(), Traffic())
