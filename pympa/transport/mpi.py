"""Messages over MPI: host buffers, non-blocking, and a deadline for every wait."""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from pympa.runtime.arena import Arena, Array, SharedAddress
from pympa.runtime.trace import Seen
from pympa.transport.endpoint import Message, TransportError, raw_bytes
from pympa.transport.shared import SharedMemory

_FIRST_SLEEP_SECONDS = 20e-6  # ranks that share cores must not use them while they wait
_LONGEST_SLEEP_SECONDS = 500e-6
_IDLE_SECONDS = 10e-3  # 14 ranks that poll this often use less than 1% of a core
_IDLE_TAG = 32767  # the largest tag that every MPI library allows; channels count from 0


@dataclass
class _Pending:
    """The messages of one `start`.

    `left` is the number of messages that are not done, `wrong` the text about an unexpected size.
    """

    requests: list[MPI.Request]
    receives: Sequence[Message]
    sends: Sequence[Message]
    seen: Seen
    left: int
    wrong: str | None = None


class MpiEndpoint:
    """One rank of a communicator.

    Args:
        comm: the communicator. It is duplicated, so that messages never mix with the caller's.
            Collective.
        timeout_seconds: the longest time of a single wait.
        sleeps: whether ranks sleep between polls, because they share cores.
        shares_memory: whether ranks of one node read each other's shared arrays, where they can.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        *,
        timeout_seconds: float,
        sleeps: bool,
        shares_memory: bool = False,
    ) -> None:
        self._comm = comm.Dup()
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()
        self.timeout_seconds = timeout_seconds
        self.sleeps = sleeps
        self._pending: list[_Pending] = []
        self._reach = _try_memory(self._comm) if shares_memory else None

    def start(self, sends: Sequence[Message], receives: Sequence[Message], seen: Seen) -> _Pending:
        """Post all receives, then all sends."""
        self.poll()
        requests = [
            self._comm.Irecv([raw_bytes(m.array), MPI.BYTE], m.peer, m.channel) for m in receives
        ]
        requests += [
            self._comm.Isend([raw_bytes(m.array), MPI.BYTE], m.peer, m.channel) for m in sends
        ]
        pending = _Pending(requests, receives, sends, seen, len(requests))
        self._pending.append(pending)
        return pending

    def wait(self, pending: _Pending, what: str) -> None:
        """Wait until all messages of `pending` are done.

        Raises:
            TransportError: the deadline passed, or a message had an unexpected size.
        """
        deadline = time.monotonic() + self.timeout_seconds
        pause = _FIRST_SLEEP_SECONDS
        while not self._done(pending):
            if time.monotonic() > deadline:
                peers = sorted({m.peer for m in (*pending.receives, *pending.sends)})
                raise TransportError(
                    f"rank {self.rank} waited {self.timeout_seconds:g} s on {what} for messages "
                    f"from or to ranks {peers}; raise --timeout if the work takes longer"
                )
            if self.sleeps:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_SLEEP_SECONDS)
            else:
                os.sched_yield()
        self.poll()
        self._check_size(pending, what)

    def done(self, pending: _Pending, what: str) -> bool:
        """Let messages progress, and return whether all messages of `pending` are done.

        Raises:
            TransportError: a message had an unexpected size.
        """
        self.poll()
        done = self._done(pending)
        if done:
            self._check_size(pending, what)
        return done

    def poll(self) -> None:
        """Test all messages in flight, which lets MPI progress; a probe would not."""
        self._pending = [pending for pending in self._pending if not self._done(pending)]

    def _done(self, pending: _Pending) -> bool:
        """Record the messages that are done, and return whether all are."""
        if not pending.left:
            return True
        statuses: list[MPI.Status] = []
        try:
            done = MPI.Request.Testsome(pending.requests, statuses) or []
        except MPI.Exception as error:
            if not any(_is_truncation(status) for status in statuses):
                raise TransportError(f"rank {self.rank}: {error}") from None
            longest = max(message.array.nbytes for message in pending.receives)
            sources = sorted({message.peer for message in pending.receives})
            pending.wrong = f"at most {longest} bytes from ranks {sources}; got more"
            pending.left = 0
            return True
        for index, status in zip(done, statuses, strict=True):
            pending.seen(index)
            pending.left -= 1
            if index < len(pending.receives):
                message, count = pending.receives[index], status.Get_count(MPI.BYTE)
                if count != message.array.nbytes:
                    pending.wrong = (
                        f"{message.array.nbytes} bytes from rank {message.peer}; got {count}"
                    )
        return not pending.left

    def _check_size(self, pending: _Pending, what: str) -> None:
        if pending.wrong is not None:
            raise TransportError(f"rank {self.rank} expected on {what} {pending.wrong}")

    def reaches(self, ranks: Sequence[int]) -> bool:
        """Return whether each of these ranks could read a piece of each other's memory."""
        reach = self._reach
        return reach is not None and all(reach[a][b] for a in ranks for b in ranks)

    def copy(self, target: Array, source: Array) -> None:
        """Copy between two arrays of this rank."""
        np.copyto(target, source)

    def first(self, size: int, *, sleeps: bool) -> MpiEndpoint:
        """Return the first ranks as their own world; they keep their numbers.

        It lives as long as this one, which must have no messages in flight.
        """
        view = copy.copy(self)
        view.size, view.sleeps, view._pending = size, sleeps, []
        return view

    def idle_barrier(self) -> None:
        """Wait until all ranks have called this, sleeping to free the cores. Collective.

        There is no deadline: working ranks have their own, and their errors end the job. It uses
        messages, because a barrier would include the idle ranks that a view leaves out.
        """
        nothing, others = [bytearray(), MPI.BYTE], range(1, self.size)
        if self.rank == 0:
            _sleep_until_done([self._comm.Irecv(nothing, other, _IDLE_TAG) for other in others])
            _sleep_until_done([self._comm.Isend(nothing, other, _IDLE_TAG) for other in others])
        else:
            both = self._comm.Isend(nothing, 0, _IDLE_TAG), self._comm.Irecv(nothing, 0, _IDLE_TAG)
            _sleep_until_done(both)

    def close(self) -> None:
        """Free the duplicated communicator. Collective."""
        self._comm.Free()


def _sleep_until_done(requests: Sequence[MPI.Request]) -> None:
    try:
        while not MPI.Request.Testall(requests):
            time.sleep(_IDLE_SECONDS)
    except MPI.Exception as error:
        raise TransportError(f"while this rank was idle: {error}") from None


def _is_truncation(status: MPI.Status) -> bool:
    return MPI.Get_error_class(status.Get_error()) == MPI.ERR_TRUNCATE


def _try_memory(comm: MPI.Comm) -> list[list[bool]]:
    """Return for each rank which ranks' shared memory it can read. Collective."""
    arena = Arena()
    token = arena.empty((1,), np.int64, shared=True)
    token[0] = comm.Get_rank()
    everyone = comm.allgather((platform.node(), arena.shared_address(token)))

    def can_read(rank: int, node: str, address: SharedAddress) -> bool:
        if node != platform.node():
            return False
        try:
            seen = SharedMemory().view(address, (1,), np.dtype(np.int64))
        except OSError:
            return False
        return bool(seen[0] == rank)

    mine = [can_read(rank, *other) for rank, other in enumerate(everyone)]
    reach: list[list[bool]] = comm.allgather(mine)
    arena.close()
    return reach
