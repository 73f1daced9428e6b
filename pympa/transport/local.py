"""Ranks as threads of one process: reproducible, with optional delays, and deadlocks are reported.

Only one rank runs at a time; every transport call chooses the next one. With a seed, the choice and
the delay of each message are random but repeatable. A message is copied from the sender's to the
receiver's array exactly when it is delivered, so a buffer that is reused too early gives wrong
results here, not only under MPI.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from pympa.runtime.arena import Array
from pympa.runtime.trace import Seen
from pympa.transport.endpoint import Message, TransportError, raw_bytes
from pympa.transport.threads import RankThreads

T = TypeVar("T")


class _Pending:
    """The messages of one `start` by index: those in flight, and those done but not yet seen."""

    def __init__(self, sends: Sequence[Message], receives: Sequence[Message], seen: Seen) -> None:
        self.receives = dict(enumerate(receives))
        self.sends = dict(enumerate(sends, len(receives)))
        self._seen = seen
        self._unseen: list[int] = []

    @property
    def done(self) -> bool:
        return not self.sends and not self.receives

    def deliver(self, index: int) -> None:
        del (self.receives if index in self.receives else self.sends)[index]
        self._unseen.append(index)

    def look(self) -> None:
        for index in self._unseen:
            self._seen(index)
        self._unseen.clear()


class _Transfer:
    def __init__(self, due: int, sender: _Post, receiver: _Post) -> None:
        self.due = due
        self.sender = sender
        self.receiver = receiver


class _Post:
    def __init__(self, rank: int, index: int, message: Message, pending: _Pending) -> None:
        self.rank = rank
        self.index = index
        self.message = message
        self.pending = pending


class LocalWorld(RankThreads):
    """A world of rank threads.

    Args:
        size: the number of ranks.
        seed: a seed that shuffles ranks and delays, repeatably; None runs ranks in order and
            delivers at once.
        max_delay: the largest delay of a message, in scheduling steps, with a seed.
        shares_memory: whether ranks read each other's shared arrays where they can.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int | None = None,
        max_delay: int = 8,
        shares_memory: bool = False,
    ) -> None:
        super().__init__(size)
        self.shares_memory = shares_memory
        self._random = None if seed is None else random.Random(seed)
        self._max_delay = max_delay
        self._waiting: list[tuple[_Pending, str] | None] = [None] * size
        self._step = 0
        self._last = size - 1
        self._posted_sends: defaultdict[tuple[int, int, int], deque[_Post]] = defaultdict(deque)
        self._posted_receives: defaultdict[tuple[int, int, int], deque[_Post]] = defaultdict(deque)
        self._transfers: list[_Transfer] = []

    def run(self, body: Callable[[LocalEndpoint], T]) -> list[T]:
        """Run `body` once for each rank and return the results in rank order.

        Raises:
            TransportError: the ranks are in a deadlock.
            Exception: the exception of the first rank that failed.
        """
        return self.run_ranks(lambda rank: body(LocalEndpoint(self, rank)))

    def post(self, rank: int, pending: _Pending) -> None:
        """Add messages and match them with those of other ranks."""
        for index, message in pending.sends.items():
            key = (rank, message.peer, message.channel)
            self._posted_sends[key].append(_Post(rank, index, message, pending))
            self._match(key)
        for index, message in pending.receives.items():
            key = (message.peer, rank, message.channel)
            self._posted_receives[key].append(_Post(rank, index, message, pending))
            self._match(key)

    def wait(self, rank: int, pending: _Pending, what: str) -> None:
        """Block the rank until `pending` is done."""
        while not pending.done:
            self._waiting[rank] = (pending, what)
            self.yield_turn(rank)
        self._waiting[rank] = None

    @property
    def shuffles(self) -> bool:
        """Whether scheduling is random."""
        return self._random is not None

    @property
    def steps(self) -> int:
        """The number of scheduling steps so far, the world's clock, in which delays are counted."""
        return self._step

    def _match(self, key: tuple[int, int, int]) -> None:
        sends, receives = self._posted_sends[key], self._posted_receives[key]
        while sends and receives:
            delay = self._random.randint(0, self._max_delay) if self._random else 0
            transfer = _Transfer(self._step + delay, sends.popleft(), receives.popleft())
            self._transfers.append(transfer)

    def _deliver_due(self) -> None:
        due = [t for t in self._transfers if t.due <= self._step]
        self._transfers = [t for t in self._transfers if t.due > self._step]
        for t in due:
            source, target = t.sender.message.array, t.receiver.message.array
            if source.nbytes != target.nbytes:
                raise TransportError(
                    f"rank {t.receiver.rank} expected {target.nbytes} bytes from rank "
                    f"{t.sender.rank}; got {source.nbytes}"
                )
            raw_bytes(target)[:] = raw_bytes(source)
            for post in (t.sender, t.receiver):
                post.pending.deliver(post.index)

    def _run_next(self) -> None:
        """Deliver messages that are due, and run the next rank that can run."""
        try:
            rank = self._next_rank()
        except TransportError as error:
            self._failure = self._failure or error
            rank = self._any_unfinished()
        if rank is not None:
            self._last = rank
            self._give_turn(rank)

    def _next_rank(self) -> int | None:
        if self._failure is not None:
            return self._any_unfinished()
        while True:
            self._step += 1
            self._deliver_due()
            runnable = [r for r in range(self.size) if self._can_run(r)]
            if runnable:
                if self._random:
                    return self._random.choice(runnable)
                return min(runnable, key=lambda r: (r - self._last - 1) % self.size)
            if all(self._finished):
                return None
            if not self._transfers:
                raise TransportError(f"deadlock: {self._who_waits()}")
            self._step = min(t.due for t in self._transfers) - 1

    def _can_run(self, rank: int) -> bool:
        waiting = self._waiting[rank]
        return not self._finished[rank] and (waiting is None or waiting[0].done)

    def _who_waits(self) -> str:
        lines = []
        for rank, waiting in enumerate(self._waiting):
            if self._finished[rank]:
                lines.append(f"rank {rank} has ended")
            elif waiting is not None:
                pending, what = waiting
                sources = [message.peer for message in pending.receives.values()]
                targets = [message.peer for message in pending.sends.values()]
                lines.append(
                    f"rank {rank} waits on {what} to receive from {sources} "
                    f"and to send to {targets}"
                )
        return "; ".join(lines)


class LocalEndpoint:
    """The endpoint of one rank thread of a `LocalWorld`."""

    def __init__(self, world: LocalWorld, rank: int) -> None:
        self._world = world
        self.rank = rank
        self.size = world.size
        self._pending: list[_Pending] = []

    def start(self, sends: Sequence[Message], receives: Sequence[Message], seen: Seen) -> _Pending:
        """Post messages; with a seed, other ranks may run before this returns."""
        pending = _Pending(sends, receives, seen)
        self._pending.append(pending)
        self._world.post(self.rank, pending)
        self.poll()
        return pending

    def wait(self, pending: _Pending, what: str) -> None:
        """Run other ranks until all messages of `pending` are delivered."""
        self._world.wait(self.rank, pending, what)
        self._look()

    def done(self, pending: _Pending, what: str) -> bool:
        """Let other ranks run, and return whether all messages of `pending` are delivered."""
        self._world.yield_turn(self.rank)
        self._look()
        return pending.done

    def reaches(self, ranks: Sequence[int]) -> bool:
        """Return the world's setting: all ranks are in one process."""
        return self._world.shares_memory

    def poll(self) -> None:
        """With a seed, let other ranks run."""
        if self._world.shuffles:
            self._world.yield_turn(self.rank)
        self._look()

    def copy(self, target: Array, source: Array) -> None:
        """Copy between two arrays of this rank."""
        np.copyto(target, source)

    def close(self) -> None:
        """Do nothing: the world ends with its ranks."""

    def _look(self) -> None:
        """Call `seen` for the messages that are done."""
        for pending in self._pending:
            pending.look()
        self._pending = [pending for pending in self._pending if not pending.done]
