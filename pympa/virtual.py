"""Ranks on virtual clocks: the same strategies, timed by a cost model and links instead of a wall.

Each rank is a thread with a clock of its own, which kernels advance. A message leaves when both
sides have posted it. The sender's way out and the receiver's way in each move their messages one
after the other, at their bandwidth; a message has come when both have moved it, plus the latency.
So flows that share a way share its bandwidth, and one that waits on one side holds up nobody on the
other. Links of different levels are ways of their own. Whoever would post a message first lets the
ranks go whose clocks are behind, so ways are taken in order of time and a run is the same every
time. While a device's messages are under way its kernels have fewer processors; what that takes
shows as waiting for them.
"""

from __future__ import annotations

import heapq
import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from pympa.arena import Array
from pympa.cluster import LARGE_START_BYTES, Cluster
from pympa.trace import Seen
from pympa.transport import Message, TransportError, raw_bytes
from pympa.transport.threads import RankThreads

T = TypeVar("T")

_SAME_SECONDS = 1e-9  # clocks that are so near are equal but for rounding: no reason to take turns


class Pending:
    """Messages of one `start`.

    Args:
        messages: how many. seen: see `Endpoint.start`.
        worked: seconds that the rank's kernels took before.

    Attributes:
        unmatched: messages that have no other side yet. done_at: when each is done, seconds.
        begun_at: when the first had both sides. share: of the processors that messages keep.
    """

    def __init__(self, messages: int, seen: Seen, worked: float) -> None:
        self.unmatched = messages
        self.seen = seen
        self.worked = worked
        self.done_at = [0.0] * messages
        self.begun_at = math.inf
        self.share = 0.0

    def held_up(self, now: float, worked: float) -> float:
        """Return how much longer kernels took beside the messages, given what they took alone.

        Args:
            now: clock without it.
            worked: seconds of the rank's kernels until then.
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


class _Way(NamedTuple):
    """From one rank to another: the two ports, seconds of latency and of each byte.

    share: of a device's processors that messages keep.
    """

    way_out: tuple[bool, int, int]
    way_in: tuple[bool, int, int]
    latency: float
    per_byte: float
    share: float


class Slow(NamedTuple):
    """What is slower than it should be.

    ranks: factor on the kernels' time of a rank. links: factor on the time of bytes between two
    ranks, the lower one first.
    """

    ranks: dict[int, float]
    links: dict[tuple[int, int], float]


class VirtualWorld(RankThreads):
    """A world of ranks on virtual clocks.

    Args:
        size: ranks.
        cluster: links between them.
        slow: which ranks and links are slower than the cluster's.
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
        self._able = [(0.0, rank) for rank in range(size)]
        self._waiting: dict[int, tuple[Pending, str]] = {}
        self._sends: defaultdict[tuple[int, int, int], deque[_Post]] = defaultdict(deque)
        self._receives: defaultdict[tuple[int, int, int], deque[_Post]] = defaultdict(deque)
        self._ways: dict[tuple[int, int], _Way] = {}
        self._free: defaultdict[tuple[bool, int, int], float] = defaultdict(float)

    def run(self, body: Callable[[VirtualEndpoint], T]) -> list[T]:
        """Run `body` once for each rank and return the results in rank order.

        Raises:
            TransportError: the ranks wait for each other for ever.
            Exception: whatever the first failing rank raised.
        """
        # Only one of the threads runs at a time, and a core is slow to wake another one's thread.
        cores = sorted(os.sched_getaffinity(0))
        core = cores[os.getpid() % len(cores)]

        def on_one_core(rank: int) -> T:
            os.sched_setaffinity(0, {core})  # of this thread
            return body(VirtualEndpoint(self, rank))

        return self.run_ranks(on_one_core)

    def let_others_go(self, rank: int) -> None:
        """Return when no rank that can run is behind this one's clock."""
        if self._able and self._able[0][0] < self.clocks[rank] - _SAME_SECONDS:
            heapq.heappush(self._able, (self.clocks[rank], rank))
            self.yield_turn(rank)

    def post(self, key: tuple[int, int, int], post: _Post, *, sends: bool) -> None:
        """Take one side of a message from key[0] to key[1] and match it with the other."""
        mine, theirs = (self._sends, self._receives) if sends else (self._receives, self._sends)
        if not theirs[key]:
            mine[key].append(post)
            return
        other = theirs[key].popleft()
        sender, receiver = (post, other) if sends else (other, post)
        self._transfer(key[0], key[1], sender, receiver)

    def wait(self, rank: int, pending: Pending, what: str) -> None:
        """Block the rank until all messages of `pending` are done, and set its clock to that."""
        self.calls += 1
        if pending.unmatched:
            self._waiting[rank] = pending, what
            self.yield_turn(rank)
        now = self.clocks[rank]
        now += pending.held_up(now, self.worked[rank])
        for index, done_at in enumerate(pending.done_at):
            self.clocks[rank] = done_at  # when it was done, whenever that is looked at
            pending.seen(index)
        self.clocks[rank] = max([now, *pending.done_at])

    def _transfer(self, source: int, target: int, sender: _Post, receiver: _Post) -> None:
        size = sender.array.nbytes
        if size != receiver.array.nbytes:
            raise TransportError(
                f"rank {target} expected {receiver.array.nbytes} bytes from rank {source}; "
                f"got {size}"
            )
        way = self._way(source, target)
        posted, seconds = max(sender.posted_at, receiver.posted_at), size * way.per_byte
        left = self._free[way.way_out] = max(posted, self._free[way.way_out]) + seconds
        came = self._free[way.way_in] = max(posted, self._free[way.way_in]) + seconds
        done_at = max(left, came) + way.latency
        if receiver.array.flags.writeable:  # counts of rows, and the like; shapes have no memory
            raw_bytes(receiver.array)[:] = raw_bytes(sender.array)
        for rank, post in ((source, sender), (target, receiver)):
            post.pending.unmatched -= 1
            post.pending.done_at[post.number] = done_at
            post.pending.begun_at = min(post.pending.begun_at, posted)
            post.pending.share = max(post.pending.share, way.share)
            waiting = self._waiting.get(rank)
            if waiting is not None and waiting[0] is post.pending and not post.pending.unmatched:
                del self._waiting[rank]
                heapq.heappush(self._able, (max([self.clocks[rank], *post.pending.done_at]), rank))

    def own_seconds(self, rank: int, messages: Sequence[Message]) -> float:
        """Return what a rank takes to post messages."""
        if self._posts_free or not messages:
            return 0.0
        links = [self.cluster.link(rank, message.peer) for message in messages]
        large = sum(message.array.nbytes for message in messages) >= LARGE_START_BYTES
        starts = (link.large_start_seconds if large else link.start_seconds for link in links)
        return max(starts) + sum(link.message_seconds for link in links)

    def _way(self, source: int, target: int) -> _Way:
        return self._ways.get((source, target)) or self._new_way(source, target)

    def _new_way(self, source: int, target: int) -> _Way:
        link = self.cluster.link(source, target)
        level = self.cluster.links.index(link)
        factor = self.slow.links.get((min(source, target), max(source, target)), 1.0)
        way = _Way(
            (True, level, source // link.ranks_at_port),
            (False, level, target // link.ranks_at_port),
            link.latency_seconds,
            factor / link.bytes_per_second,
            link.processors / self.cluster.device.processors,
        )
        self._ways[source, target] = way
        return way

    def _pass_on(self) -> None:
        """Give the turn to the rank whose clock is behind."""
        if self._able:
            self._give_turn(heapq.heappop(self._able)[1])
        elif self._waiting:
            self._failure = self._failure or TransportError(f"deadlock: {self._who_waits()}")
            rank = next(iter(self._waiting))
            del self._waiting[rank]
            self._give_turn(rank)

    def _who_waits(self) -> str:
        shown = sorted(self._waiting.items())[:16]
        return "; ".join(f"rank {rank} waits on {what}" for rank, (_, what) in shown)


class VirtualEndpoint:
    """One rank of a `VirtualWorld`."""

    def __init__(self, world: VirtualWorld, rank: int) -> None:
        self._world = world
        self.rank = rank
        self.size = world.size

    def clock(self) -> float:
        """Return the rank's seconds."""
        return self._world.clocks[self.rank]

    def advance(self, seconds: float) -> None:
        """Let time pass in a kernel."""
        seconds *= self._world.slow.ranks.get(self.rank, 1.0)
        self._world.clocks[self.rank] += seconds
        self._world.worked[self.rank] += seconds

    def worked(self) -> float:
        """Return the seconds that the rank's kernels took so far."""
        return self._world.worked[self.rank]

    def skip(self, seconds: float, worked: float) -> None:
        """Let time pass in what is like something before it, some of it in kernels."""
        self._world.clocks[self.rank] += seconds
        self._world.worked[self.rank] += worked

    def start(self, sends: Sequence[Message], receives: Sequence[Message], seen: Seen) -> Pending:
        """Post messages."""
        world = self._world
        world.calls += 1
        world.clocks[self.rank] += world.own_seconds(self.rank, [*receives, *sends])
        world.let_others_go(self.rank)
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
        """Let time pass until all messages of `pending` are done."""
        self._world.wait(self.rank, pending, what)

    def poll(self) -> None:
        """Do nothing: messages move by themselves."""

    def reaches(self, ranks: Sequence[int]) -> bool:
        """Tell whether these ranks can all read each other's memory; GPUs send."""
        return self._world.cluster.shares_memory(ranks)

    def copy(self, target: Array, source: Array) -> None:
        """Copy between two arrays of this rank, if they have memory."""
        if target.flags.writeable:
            target[...] = source
