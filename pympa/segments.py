"""Shared memory that MPICH names in /dev/shm. Imports nothing heavy: all command lines call it."""

from __future__ import annotations

from pathlib import Path

_SEGMENT = "/dev/shm/mpich_shm_"


def unlink_shared_files() -> None:
    """Remove the names of this job's MPICH segments in /dev/shm; the memory stays mapped.

    Call it once all ranks of the node are past MPI_Init. MPICH removes the names itself when a job
    ends well; after an abort nobody would, and each job would leave 4 MiB behind.
    """
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    for name in {line.split()[-1] for line in lines if line.split()[-1].startswith(_SEGMENT)}:
        Path(name).unlink(missing_ok=True)
