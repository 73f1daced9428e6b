"""The other ranks of one mesh axis.

An `Endpoint` moves bytes between ranks: over MPI (`mpi.py`), between threads of one process
(`local.py`), between devices (`nccl.py`, `staged.py`), or nowhere (`NullEndpoint`). `Transport` is
what a strategy sees: peers are indices along its axis, collectives are built from point-to-point
messages, bytes are counted by axis and pair, waiting and messages in flight are traced. One
implementation of the collectives serves every endpoint, so every endpoint counts the same bytes.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Arena, Array, Place
from pympa.device import flat_bytes
from pympa.mesh import AXES, EXPERT_AXES, Mesh
from pympa.trace import Seen, Trace
from pympa.transport.shared import Shape, SharedMemory

WORLD = "world"  # control traffic: agreement, records, verification; never counted
CHANNELS = (WORLD, *AXES, *EXPERT_AXES, "ulysses")
"""By number; see `Message`."""


class TransportError(RuntimeError):
    """Messages that do not fit each other, or that never came."""


class Message(NamedTuple):
    """A C-contiguous array and the rank it goes to or comes from.

    `channel` separates axes: messages of one channel and pair arrive in the order they were sent.
    """

    array: Array
    peer: int
    channel: int


class Loan(NamedTuple):
    """Arrays that ranks show each other, and the messages that say where they are."""

    arrays: list[Array]
    shapes: list[list[Shape]]
    places: NDArray[np.int64]
    pending: Any


Reaches = Callable[[Sequence[int]], bool]


class Endpoint(Protocol):
    """Moves messages between the ranks of a world; knows nothing of axes."""

    rank: int
    size: int

    def start(self, sends: Sequence[Message], receives: Sequence[Message], seen: Seen) -> Any:
        """Begin moving messages; the arrays stay untouched by the caller until `wait`.

        `seen` is called from the first `poll`, `start` or `wait` of this rank after a message is
        done.
        """

    def wait(self, pending: Any, what: str) -> None:
        """Return when all messages of `pending` have been sent and received."""

    def poll(self) -> None:
        """Let messages move on while this rank computes."""

    def reaches(self, ranks: Sequence[int]) -> bool:
        """Tell whether these ranks can all read each other's shared memory; alike on all."""

    def copy(self, target: Array, source: Array) -> None:
        """Copy between two arrays of this rank."""


class NullEndpoint:
    """Sends nothing: a world of one, or one rank's view of a world in which arrays are shapes.

    Args:
        rank: of the world. size: of it.
        reaches: which ranks are taken to share memory; None means none.
    """

    def __init__(self, rank: int, size: int, reaches: Reaches | None = None) -> None:
        self.rank = rank
        self.size = size
        self._reaches = reaches

    def reaches(self, ranks: Sequence[int]) -> bool:
        """Say what it was told to say."""
        return self._reaches is not None and self._reaches(ranks)

    def start(self, sends: Sequence[Message], receives: Sequence[Message], seen: Seen) -> None:
        """Be done at once."""
        for index in range(len(receives) + len(sends)):
            seen(index)

    def wait(self, pending: Any, what: str) -> None:
        """Do nothing."""

    def poll(self) -> None:
        """Do nothing."""

    def copy(self, target: Array, source: Array) -> None:
        """Do nothing."""


class Traffic:
    """Bytes sent and received by (axis, peer rank)."""

    def __init__(self) -> None:
        self.sent: Counter[tuple[str, int]] = Counter()
        self.received: Counter[tuple[str, int]] = Counter()

    def clear(self) -> None:
        """Start counting from zero; counters taken before keep their counts."""
        self.sent = Counter()
        self.received = Counter()


class Transport:
    """The ranks along one axis of the mesh, seen from one of them.

    Args:
        endpoint: moves the bytes.
        axis: name of the axis, for counting, tracing and messages.
        ranks: the world ranks along the axis, in order; contains `endpoint.rank`.
        arena: where buffers that travel come from. shares_memory (attribute): the ranks can read
            each other's shared arrays.
        trace: collects the waiting and the messages in flight.
        traffic: collects the bytes.
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
        self._endpoint = endpoint
        self._arena = arena
        self._trace = trace
        self._traffic = traffic
        self.shares_memory = self.size > 1 and endpoint.reaches(self.ranks)
        self._memory = SharedMemory()
        self._unsettled: list[Any] = []
        self._channel = CHANNELS.index(axis)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any] | type[Any]) -> Array:
        """Return an array fit to travel, from the arena."""
        return self._arena.empty(shape, dtype, "messages")

    def start(
        self, sends: Sequence[tuple[Array, int]], receives: Sequence[tuple[Array, int]]
    ) -> Any:
        """Begin sending (array, to index) and receiving (array, from index); see `Endpoint`.

        Empty arrays are skipped: both sides know their size. What a rank sends to itself is copied
        at once and not counted.
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
        seen = self._trace.post(self.axis, incoming, outgoing) if counts else _overlook
        return self._endpoint.start(outgoing, incoming, seen)

    def wait(self, pending: Any) -> None:
        """Return when everything `start` began is done."""
        with self._trace.span("wait", self.axis):
            self._endpoint.wait(pending, self.axis)

    def poll(self) -> None:
        """Let messages move on while this rank computes."""
        self._endpoint.poll()

    def lend(self, arrays: Sequence[Array], shapes: Sequence[Sequence[Shape]]) -> Loan:
        """Begin to show `arrays`, which are in shared memory, to all ranks. Collective.

        Args:
            arrays: of this rank; they stay as they are until `settle`.
            shapes: of the arrays of each rank.
        """
        places = np.zeros((self.size, len(arrays), len(Place._fields)), np.int64)
        if not self._arena.dry:
            places[self.index] = [self._arena.place(array) for array in arrays]
        others = [i for i in range(self.size) if i != self.index]
        own = places[self.index]
        pending = self._start_uncounted(
            [(own, i) for i in others], [(places[i], i) for i in others]
        )
        return Loan(list(arrays), [*map(list, shapes)], places, pending)

    def views(self, loan: Loan) -> list[list[Array]]:
        """Return every rank's arrays of a loan, to read only. Collective."""
        self.wait(loan.pending)
        found = []
        for rank, shapes in enumerate(loan.shapes):
            if rank == self.index:
                found.append(loan.arrays)
                continue
            if self._arena.dry:
                both = zip(shapes, loan.arrays, strict=True)
                found.append([np.broadcast_to(np.zeros((), a.dtype), shape) for shape, a in both])
                continue
            places = [Place(*map(int, place)) for place in loan.places[rank]]
            dtypes = [array.dtype for array in loan.arrays]
            parts = zip(places, shapes, dtypes, strict=True)
            found.append([self._memory.view(*part) for part in parts])
        return found

    def give_back(self, bytes_sent: int, bytes_received: int) -> None:
        """Tell all ranks that their arrays have been read. Collective.

        Args:
            bytes_sent: what a ring of messages would have sent to the next rank instead, which
                is what counts.
            bytes_received: what it would have brought from the previous rank.
        """
        following = self.ranks[(self.index + 1) % self.size]
        previous = self.ranks[(self.index - 1) % self.size]
        self._traffic.sent[self.axis, following] += bytes_sent
        self._traffic.received[self.axis, previous] += bytes_received
        others = [i for i in range(self.size) if i != self.index]
        told, heard = np.zeros(self.size, np.uint8), np.zeros(self.size, np.uint8)
        self._unsettled.append(
            self._start_uncounted(
                [(told[i : i + 1], i) for i in others], [(heard[i : i + 1], i) for i in others]
            )
        )

    def settle(self) -> None:
        """Return when all ranks have read all that this one lent."""
        while self._unsettled:
            self.wait(self._unsettled.pop())

    def all_gather(self, parts: Sequence[Array]) -> None:
        """Fill in the other ranks' parts; `parts[self.index]` is this rank's own. Collective."""
        others = [i for i in range(self.size) if i != self.index]
        mine = parts[self.index]
        self.wait(self.start([(mine, i) for i in others], [(parts[i], i) for i in others]))

    def all_to_all(self, sends: Sequence[Array], receives: Sequence[Array]) -> None:
        """Send `sends[i]` to rank i and receive `receives[i]` from it. Collective."""
        peers = range(self.size)
        outgoing, incoming = zip(sends, peers, strict=True), zip(receives, peers, strict=True)
        self.wait(self.start([*outgoing], [*incoming]))

    def broadcast(self, array: Array, root: int) -> None:
        """Make `array` on all ranks what it is on index `root`. Collective."""
        if self.index == root:
            others = [i for i in range(self.size) if i != root]
            self.wait(self.start([(array, i) for i in others], []))
        else:
            self.wait(self.start([], [(array, root)]))

    def exchange_counts(self, counts: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """Send `counts[i]` to rank i and return what each sent here. Collective.

        Every rank sends arrays of one shape to the same rank. Where nothing is sent, because
        arrays are only shapes, others are taken to send what this rank sends itself.
        """
        received = [counts[self.index].copy() for _ in counts]
        self.all_to_all(counts, received)
        return received

    def _messages(self, parts: Sequence[tuple[Array, int]]) -> list[Message]:
        """Return what travels: neither empty arrays nor those of this rank for itself."""
        return [
            Message(array, self.ranks[peer], self._channel)
            for array, peer in parts
            if array.size and peer != self.index
        ]

    def gather_objects(self, value: Any, root: int | None = None) -> list[Any]:
        """Return every rank's picklable value, in order. Collective.

        Args:
            value: this rank's.
            root: the only index that gets them (others get an empty list); None means all.
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


def _overlook(index: int, stream: int | None = None) -> None:
    """Take no note of a message that is done."""


def axis_transports(
    endpoint: Endpoint, mesh: Mesh, arena: Arena, trace: Trace, traffic: Traffic
) -> dict[str, Transport]:
    """Return the transports of a rank, by name.

    pp, cp, dim, ep, etp and ulysses are groups of the mesh. tp spans the `columns`, for it sums
    over tp·dim. ring is a part of cp, and counts as cp.
    """
    groups = {name: (name, name) for name in ("pp", "cp", "dim", "ep", "etp", "ulysses")}
    groups |= {"tp": ("tp", "columns"), "ring": ("cp", "ring")}
    return {
        name: Transport(endpoint, axis, mesh.group(group), arena, trace, traffic)
        for name, (axis, group) in groups.items()
    }


def raw_bytes(array: Array) -> NDArray[np.uint8]:
    """Return a C-contiguous array's memory as bytes.

    Raises:
        TransportError: the array has gaps.
    """
    try:
        raw: NDArray[np.uint8] = flat_bytes(array)
    except ValueError as error:
        raise TransportError(f"message: {error}") from None
    return raw
