"""Messages over MPI: host buffers, non-blocking, every wait with a deadline."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mpi4py import MPI

from pympa.arena import Array
from pympa.transport import Message, TransportError, raw_bytes

_FIRST_NAP_SECONDS = 20e-6  # ranks that share cores must not burn them while they wait
_SEGMENT = "/dev/shm/mpich_shm_"
_LONGEST_NAP_SECONDS = 500e-6


@dataclass
class _Pending:
    requests: list[MPI.Request]
    receives: Sequence[Message]
    sends: Sequence[Message]


class MpiEndpoint:
    """One rank of a communicator.

    Args:
        comm: is duplicated, so that messages never meet the caller's own. Collective.
        timeout_seconds: longest time any single wait may take.
        naps: sleep between looks; for ranks that share cores.
    """

    def __init__(self, comm: MPI.Comm, *, timeout_seconds: float, naps: bool) -> None:
        self._comm = comm.Dup()
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()
        self.timeout_seconds = timeout_seconds
        self.naps = naps

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Pending:
        """Post all receives, then all sends."""
        requests = [
            self._comm.Irecv([raw_bytes(m.array), MPI.BYTE], m.peer, m.channel) for m in receives
        ]
        requests += [
            self._comm.Isend([raw_bytes(m.array), MPI.BYTE], m.peer, m.channel) for m in sends
        ]
        return _Pending(requests, receives, sends)

    def wait(self, pending: _Pending, what: str) -> None:
        """Complete all requests.

        Raises:
            TransportError: the deadline passed, or a message had another size than expected.
        """
        statuses = [MPI.Status() for _ in pending.requests]
        deadline = time.monotonic() + self.timeout_seconds
        nap = _FIRST_NAP_SECONDS
        while not MPI.Request.Testall(pending.requests, statuses):
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
        for message, status in zip(pending.receives, statuses, strict=False):
            count = status.Get_count(MPI.BYTE)
            if count != message.array.nbytes:
                raise TransportError(
                    f"rank {self.rank} expected {message.array.nbytes} bytes on {what} from rank "
                    f"{message.peer}; got {count}"
                )

    def poll(self) -> None:
        """Enter the MPI library once, which moves messages on."""
        self._comm.Iprobe(MPI.PROC_NULL, 0)

    def copy(self, target: Array, source: Array) -> None:
        """Copy between two arrays of this rank."""
        np.copyto(target, source)

    def close(self) -> None:
        """Free the duplicated communicator. Collective."""
        self._comm.Free()


def unlink_shared_files() -> None:
    """Remove the names of this job's MPICH segments in /dev/shm; the memory stays mapped.

    Call it once all ranks of the node are past MPI_Init. MPICH removes the names itself when a job
    ends well; after an abort nobody would, and each job would leave 4 MiB behind.
    """
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    for name in {line.split()[-1] for line in lines if line.split()[-1].startswith(_SEGMENT)}:
        Path(name).unlink(missing_ok=True)
