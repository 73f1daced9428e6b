"""Messages over MPI: host buffers, non-blocking, every wait with a deadline."""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from pympa.arena import Arena, Array, Place
from pympa.trace import Seen
from pympa.transport import Message, TransportError, raw_bytes
from pympa.transport.shared import SharedMemory

_FIRST_NAP_SECONDS = 20e-6  # ranks that share cores must not burn them while they wait
_LONGEST_NAP_SECONDS = 500e-6
_REST_SECONDS = 10e-3  # 14 ranks that look this often take less than 1% of a core
_REST_TAG = 32767  # the largest that every MPI library takes; channels count from 0


@dataclass
class _Pending:
    """Messages of one `start`: `left` are not done, `wrong` tells of one of another size."""

    requests: list[MPI.Request]
    receives: Sequence[Message]
    sends: Sequence[Message]
    seen: Seen
    left: int
    wrong: str | None = None


class MpiEndpoint:
    """One rank of a communicator.

    Args:
        comm: is duplicated, so that messages never meet the caller's own. Collective.
        timeout_seconds: longest time any single wait may take.
        naps: sleep between looks; for ranks that share cores.
        shares_memory: ranks of one node read each other's shared arrays, where they can.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        *,
        timeout_seconds: float,
        naps: bool,
        shares_memory: bool = False,
    ) -> None:
        self._comm = comm.Dup()
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()
        self.timeout_seconds = timeout_seconds
        self.naps = naps
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
        """Complete all requests.

        Raises:
            TransportError: the deadline passed, or a message had another size than expected.
        """
        deadline = time.monotonic() + self.timeout_seconds
        nap = _FIRST_NAP_SECONDS
        while not self._done(pending):
            if time.monotonic() > deadline:
                peers = sorted({m.peer for m in (*pending.receives, *pending.sends)})
                raise TransportError(
                    f"rank {self.rank} waited {self.timeout_seconds:g} s on {what} for messages "
                    f"from or to ranks {peers}; raise --timeout if the work takes longer"
                )
            if self.naps:
                time.sleep(nap)
                nap = min(2 * nap, _LONGEST_NAP_SECONDS)
            else:
                os.sched_yield()
        self.poll()
        self._check_size(pending, what)

    def done(self, pending: _Pending, what: str) -> bool:
        """Let messages move on, and tell whether all of `pending` have.

        Raises:
            TransportError: a message had another size than expected.
        """
        self.poll()
        done = self._done(pending)
        if done:
            self._check_size(pending, what)
        return done

    def poll(self) -> None:
        """Test what is under way, which moves it on; a probe of no rank would not."""
        self._pending = [pending for pending in self._pending if not self._done(pending)]

    def _done(self, pending: _Pending) -> bool:
        """Take note of the messages that are done by now, and tell whether all are."""
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
        """Tell whether each of these ranks could read a piece of each other's memory."""
        reach = self._reach
        return reach is not None and all(reach[a][b] for a in ranks for b in ranks)

    def copy(self, target: Array, source: Array) -> None:
        """Copy between two arrays of this rank."""
        np.copyto(target, source)

    def first(self, size: int, *, naps: bool) -> MpiEndpoint:
        """Return the first ranks as a world of their own; they keep their numbers.

        It lives as long as this one, which must have no messages under way.
        """
        view = copy.copy(self)
        view.size, view.naps, view._pending = size, naps, []
        return view

    def rest(self) -> None:
        """Return when all ranks are here; naps leave the cores to those at work. Collective.

        Has no deadline: those at work have theirs, and an error of theirs ends the job. Messages,
        because a barrier would not tell ranks of a view from those that rest outside it.
        """
        nothing, others = [bytearray(), MPI.BYTE], range(1, self.size)
        if self.rank == 0:
            _nap_until_done([self._comm.Irecv(nothing, other, _REST_TAG) for other in others])
            _nap_until_done([self._comm.Isend(nothing, other, _REST_TAG) for other in others])
        else:
            both = self._comm.Isend(nothing, 0, _REST_TAG), self._comm.Irecv(nothing, 0, _REST_TAG)
            _nap_until_done(both)

    def close(self) -> None:
        """Free the duplicated communicator. Collective."""
        self._comm.Free()


def _nap_until_done(requests: Sequence[MPI.Request]) -> None:
    try:
        while not MPI.Request.Testall(requests):
            time.sleep(_REST_SECONDS)
    except MPI.Exception as error:
        raise TransportError(f"while this rank rested: {error}") from None


def _is_truncation(status: MPI.Status) -> bool:
    return MPI.Get_error_class(status.Get_error()) == MPI.ERR_TRUNCATE


def _try_memory(comm: MPI.Comm) -> list[list[bool]]:
    """Return which ranks can read the shared memory of which. Collective."""
    arena = Arena()
    token = arena.empty((1,), np.int64, shared=True)
    token[0] = comm.Get_rank()
    everyone = comm.allgather((platform.node(), arena.place(token)))

    def can_read(rank: int, node: str, place: Place) -> bool:
        if node != platform.node():
            return False
        try:
            seen = SharedMemory().view(place, (1,), np.dtype(np.int64))
        except OSError:
            return False
        return bool(seen[0] == rank)

    mine = [can_read(rank, *other) for rank, other in enumerate(everyone)]
    reach: list[list[bool]] = comm.allgather(mine)
    arena.close()
    return reach
