"""What a rank needs while MPI starts, when Python cannot act: MPI_Init keeps the interpreter."""

def unlink_shared_files() -> None:
    """Remove the names of this job's MPICH segments in /dev/shm; the memory stays mapped.

    Call it once all ranks of the node are past MPI_Init. MPICH removes the names itself when a job
    ends well; after an abort nobody would, and each job would leave 4 MiB behind.
    """

class MpiStart:
    """A watch that ends this process by one line, and with it the job, if MPI does not start.

    A rank that ended before MPI_Init, as one that Ctrl-C caught in Python's own start, keeps the
    others waiting in it for ever: launchers end a job only for a rank that MPI knows, or that a
    signal ended.

    Args:
        task: number of this task of the launch; tasks speak in turn, and the first one ends all.
        grace_seconds: of an interrupt that all threads hold back, before the watch heeds it.
        most_seconds: that MPI may take to start.
    """

    def __init__(self, *, task: int, grace_seconds: float, most_seconds: float) -> None: ...
    def stop(self) -> None:
        """End the watch: all ranks have met."""
