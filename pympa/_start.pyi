"""Functions for the time when MPI starts, in which Python cannot run: MPI_Init holds the GIL."""

def unlink_shared_files() -> None:
    """Remove the names of this job's MPICH segments in /dev/shm; the memory stays mapped.

    Call it when all ranks of the node are past MPI_Init. MPICH removes the names itself at a normal
    end; after an abort they would remain, 4 MiB for each job.
    """

class MpiStart:
    """A watch that ends this process with one line, and so the job, if MPI does not start.

    A rank that ended before MPI_Init (for example by Ctrl-C while Python started) makes the other
    ranks wait in MPI_Init for ever: launchers end a job only for a rank that MPI knows, or that
    ended by a signal.

    Args:
        task: the index of this task of the launch; tasks print one after the other, and the first
            one ends the job.
        grace_seconds: the time after an interrupt that all threads block, until the watch handles
            it.
        most_seconds: the longest time in which MPI may start.
    """

    def __init__(self, *, task: int, grace_seconds: float, most_seconds: float) -> None: ...
    def stop(self) -> None:
        """End the watch: all ranks have passed MPI_Init."""
