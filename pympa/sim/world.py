"""Ranks on virtual clocks: the strategies' own code, timed by kernel costs and links.

Each rank is a thread with its own clock, which kernels advance. A message starts when both sides
have posted it. It passes the sender's output port and the receiver's input port. Each port moves
its messages one after the other, at its bandwidth, so messages through one port share it. A message
is done when both ports have moved it, plus the latency; one that waits at one port does not block
the other port. Each level of links has its own ports. Before a rank posts messages, ranks whose
clocks are behind run, so messages enter ports in order of time and every run gives the same result.
While a device's messages are under way, its kernels have fewer processors; the extra time is added
to the wait for these messages.
"""

from __future__ import annotations

import heapq
import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from pympa.costs.cluster import LARGE_START_BYTES, Cluster
from pympa.runtime.arena import Array
from pympa.runtime.trace import Seen
from pympa.transport.endpoint import Message, TransportError, raw_bytes
from pympa.transport.threads import RankThreads

T = TypeVar("T")

_SAME_SECONDS = 1e-9  # clocks with a smaller difference are equal except for rounding


class Pending:
    """The messages of one `start`.

    Args:
        messages: the number of messages.
        seen: a function to call for each finished message, see `Endpoint.start`.
        worked: the seconds that the rank's kernels took before.

    Attributes:
        unmatched: the number of messages that only one side has posted so far.
        done_at: the seconds at which each message is done.
        begun_at: the seconds at which both sides had posted the first message.
        share: the share of the processors that kernels cannot use because of the messages.
    """

    def __init__(self, messages: int, seen: Seen, worked: float) -> None:
        self.unmatched = messages
        self.seen = seen
        self.worked = worked
        self.done_at = [0.0] * messages
        self.begun_at = math.inf
        self.share = 0.0

    def extra_seconds(self, now: float, worked: float) -> float:
        """Return the extra seconds of kernels that ran during the messages.

        Args:
            now: the clock without the extra seconds.
            worked: the seconds of the rank's kernels so far.
        """
        beside = min(worked - self.worked, now - self.begun_at)
        if self.share == 0 or beside <= 0:
            return 0.0
        under_way = max(self.done_at) - self.begun_at
        return min(beside * self.share / (1 - self.share), under_way * self.share)


class _Post(NamedTuple):
    array: Array
    posted_at: float
    pending: Pending
    number: int


class _Path(NamedTuple):
    """The path from one rank to another: two ports, latency, seconds for each byte.

    `share` is the share of a device's processors that kernels cannot use during its messages.
    """

    out_port: tuple[bool, int, int]
    in_port: tuple[bool, int, int]
    latency: float
    per_byte: float
    share: float


class Slow(NamedTuple):
    """The parts that are slower than the cluster describes.

    Attributes:
        ranks: the factor on the kernels' time, by rank.
        links: the factor on the time of bytes between two ranks, by (lower rank, higher rank).
    """

    ranks: dict[int, float]
    links: dict[tuple[int, int], float]


class VirtualWorld(RankThreads):
    """A world of ranks on virtual clocks.

    Args:
        size: the number of ranks.
        cluster: the cluster with the links between them.
        slow: the ranks and links that are slower than the cluster describes.
    """

    def __init__(self, size: int, cluster: Cluster, slow: Slow | None = None) -> None:
        if size > cluster.links[-1].ranks:
            raise ValueError(
                f"cluster {cluster.title}: expected at most {cluster.links[-1].ranks} ranks; "
                f"got {size}"
            )
        super().__init__(size)
        self.clocks = [0.0] * size
        self.worked = [0.0] * size
        self.calls = 0
        self.slow = slow or Slow({}, {})
        self.cluster = cluster
        own = (
            max(k.start_seconds, k.large_start_seconds, k.message_seconds) for k in cluster.links
        )
        self._posts_free = not any(own)
        self._runnable = [(0.0, rank) for rank in range(size)]
        self._waiting: dict[int, tuple[Pending, str]] = {}
        self._sends: defaultdict[tuple[int, int, int], deque[_Post]] = defaultdict(deque)
        self._receives: defaultdict[tuple[int, int, int], deque[_Post]] = defaultdict(deque)
        self._paths: dict[tuple[int, int], _Path] = {}
        self._free: defaultdict[tuple[bool, int, int], float] = defaultdict(float)

    def run(self, body: Callable[[VirtualEndpoint], T]) -> list[T]:
        """Run `body` once for each rank and return the results in rank order.

        Raises:
            TransportError: the ranks are in a deadlock.
            Exception: the exception of the first rank that failed.
        """
        # Only one of the threads runs at a time, and waking a thread on another core is slow.
        cores = sorted(os.sched_getaffinity(0))
        core = cores[os.getpid() % len(cores)]

        def on_one_core(rank: int) -> T:
            os.sched_setaffinity(0, {core})  # 0 is this thread
            return body(VirtualEndpoint(self, rank))

        return self.run_ranks(on_one_core)

    def run_earlier_ranks(self, rank: int) -> None:
        """Let the ranks run whose clocks are behind this rank's, then return."""
        if self._runnable and self._runnable[0][0] < self.clocks[rank] - _SAME_SECONDS:
            heapq.heappush(self._runnable, (self.clocks[rank], rank))
            self.yield_turn(rank)

    def post(self, key: tuple[int, int, int], post: _Post, *, sends: bool) -> None:
        """Add one side of a message from key[0] to key[1]; start it if the other side is posted."""
        mine, theirs = (self._sends, self._receives) if sends else (self._receives, self._sends)
        if not theirs[key]:
            mine[key].append(post)
            return
        other = theirs[key].popleft()
        sender, receiver = (post, other) if sends else (other, post)
        self._transfer(key[0], key[1], sender, receiver)

    def wait(self, rank: int, pending: Pending, what: str) -> None:
        """Block the rank until all messages of `pending` are done, and set its clock to then."""
        self.calls += 1
        if pending.unmatched:
            self._waiting[rank] = pending, what
            self.yield_turn(rank)
        now = self.clocks[rank]
        now += pending.extra_seconds(now, self.worked[rank])
        for index, done_at in enumerate(pending.done_at):
            self.clocks[rank] = done_at  # the time at which it was done, not at which it is checked
            pending.seen(index)
        self.clocks[rank] = max([now, *pending.done_at])

    def _transfer(self, source: int, target: int, sender: _Post, receiver: _Post) -> None:
        size = sender.array.nbytes
        if size != receiver.array.nbytes:
            raise TransportError(
                f"rank {target} expected {receiver.array.nbytes} bytes from rank {source}; "
                f"got {size}"
            )
        path = self._path(source, target)
        posted, seconds = max(sender.posted_at, receiver.posted_at), size * path.per_byte
        sent_at = self._free[path.out_port] = max(posted, self._free[path.out_port]) + seconds
        received_at = self._free[path.in_port] = max(posted, self._free[path.in_port]) + seconds
        done_at = max(sent_at, received_at) + path.latency
        if receiver.array.flags.writeable:  # such as counts of rows; shapes have no memory
            raw_bytes(receiver.array)[:] = raw_bytes(sender.array)
        for rank, post in ((source, sender), (target, receiver)):
            post.pending.unmatched -= 1
            post.pending.done_at[post.number] = done_at
            post.pending.begun_at = min(post.pending.begun_at, posted)
            post.pending.share = max(post.pending.share, path.share)
            waiting = self._waiting.get(rank)
            if waiting is not None and waiting[0] is post.pending and not post.pending.unmatched:
                del self._waiting[rank]
                heapq.heappush(
                    self._runnable, (max([self.clocks[rank], *post.pending.done_at]), rank)
                )

    def own_seconds(self, rank: int, messages: Sequence[Message]) -> float:
        """Return the seconds that a rank needs to post messages."""
        if self._posts_free or not messages:
            return 0.0
        links = [self.cluster.link(rank, message.peer) for message in messages]
        large = sum(message.array.nbytes for message in messages) >= LARGE_START_BYTES
        starts = (link.large_start_seconds if large else link.start_seconds for link in links)
        return max(starts) + sum(link.message_seconds for link in links)

    def _path(self, source: int, target: int) -> _Path:
        return self._paths.get((source, target)) or self._new_path(source, target)

    def _new_path(self, source: int, target: int) -> _Path:
        link = self.cluster.link(source, target)
        level = self.cluster.links.index(link)
        factor = self.slow.links.get((min(source, target), max(source, target)), 1.0)
        path = _Path(
            (True, level, source // link.ranks_at_port),
            (False, level, target // link.ranks_at_port),
            link.latency_seconds,
            factor / link.bytes_per_second,
            link.processors / self.cluster.device.processors,
        )
        self._paths[source, target] = path
        return path

    def _run_next(self) -> None:
        """Let the rank run whose clock is furthest behind."""
        if self._runnable:
            self._give_turn(heapq.heappop(self._runnable)[1])
        elif self._waiting:
            self._failure = self._failure or TransportError(f"deadlock: {self._who_waits()}")
            rank = next(iter(self._waiting))
            del self._waiting[rank]
            self._give_turn(rank)

    def _who_waits(self) -> str:
        shown = sorted(self._waiting.items())[:16]
        return "; ".join(f"rank {rank} waits on {what}" for rank, (_, what) in shown)


class VirtualEndpoint:
    """The endpoint of one rank of a `VirtualWorld`."""

    def __init__(self, world: VirtualWorld, rank: int) -> None:
        self._world = world
        self.rank = rank
        self.size = world.size

    def clock(self) -> float:
        """Return the rank's seconds."""
        return self._world.clocks[self.rank]

    def advance(self, seconds: float) -> None:
        """Advance the clock by the seconds of a kernel."""
        seconds *= self._world.slow.ranks.get(self.rank, 1.0)
        self._world.clocks[self.rank] += seconds
        self._world.worked[self.rank] += seconds

    def worked(self) -> float:
        """Return the seconds that the rank's kernels took so far."""
        return self._world.worked[self.rank]

    def skip(self, seconds: float, worked: float) -> None:
        """Advance the clock by repeated passes; `worked` is the part in kernels."""
        self._world.clocks[self.rank] += seconds
        self._world.worked[self.rank] += worked

    def start(self, sends: Sequence[Message], receives: Sequence[Message], seen: Seen) -> Pending:
        """Post messages."""
        world = self._world
        world.calls += 1
        world.clocks[self.rank] += world.own_seconds(self.rank, [*receives, *sends])
        world.run_earlier_ranks(self.rank)
        now = self.clock()
        pending = Pending(len(sends) + len(receives), seen, world.worked[self.rank])
        for index, message in enumerate(receives):
            key = (message.peer, self.rank, message.channel)
            world.post(key, _Post(message.array, now, pending, index), sends=False)
        for index, message in enumerate(sends, len(receives)):
            key = (self.rank, message.peer, message.channel)
            world.post(key, _Post(message.array, now, pending, index), sends=True)
        return pending

    def wait(self, pending: Pending, what: str) -> None:
        """Advance the clock until all messages of `pending` are done."""
        self._world.wait(self.rank, pending, what)

    def poll(self) -> None:
        """Do nothing: messages progress without polling."""

    def reaches(self, ranks: Sequence[int]) -> bool:
        """Return whether these ranks can all read each other's memory; GPUs cannot."""
        return self._world.cluster.shares_memory(ranks)

    def copy(self, target: Array, source: Array) -> None:
        """Copy between two arrays of this rank, if they have memory."""
        if target.flags.writeable:
            target[...] = source
