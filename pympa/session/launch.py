"""Information from launchers and MPI libraries: the number of tasks, and the number of this task.

A launcher and an MPI library that do not work together start many worlds of one rank. Each of them
would do all the work alone and succeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pympa.errors import RefusedError


class Tasks(NamedTuple):
    """The tasks of a launcher: how many, the index of this one, and the launcher's name."""

    total: int
    number: int
    launcher: str


_VARIABLES = (
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "Slurm step"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "launch by OpenMPI"),
    ("PMI_SIZE", "PMI_RANK", "launch by PMI"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "launch by MVAPICH"),
)


def launched_tasks(environment: Mapping[str, str]) -> Tasks:
    """Return the largest number of tasks that any launcher reports; 1 without a launcher.

    PMIx gives a task only its index, so there are at least one more tasks than that.
    """
    found = [Tasks(1, 0, "")]
    for of_all, of_one, launcher in _VARIABLES:
        total = _number(environment.get(of_all))
        if total is not None:
            found.append(Tasks(total, _number(environment.get(of_one)) or 0, launcher))
    number = _number(environment.get("PMIX_RANK"))
    if number is not None:
        found.append(Tasks(number + 1, number, "launch by PMIx"))
    return max(found, key=lambda tasks: tasks.total)


def refuse_singletons(size: int, environment: Mapping[str, str]) -> None:
    """Refuse a world of one rank that was launched as one of several tasks.

    Args:
        size: the number of ranks of the world.
        environment: the environment variables of this process.

    Raises:
        RefusedError: the world is too small; the message gives a launch line that works.
    """
    tasks = launched_tasks(environment)
    if size > 1 or tasks.total == 1:
        return
    count = "more" if tasks.launcher.endswith("PMIx") else str(tasks.total)
    raise RefusedError(
        f"this {tasks.launcher} has {count} tasks, but MPI sees a world of one rank: the launcher "
        "and the MPI library do not work together; use the mpirun of the library that mpi4py uses "
        f"(pympa info names it), or under Slurm: srun --mpi=pmi2 -K1 -n {tasks.total} python -m ..."
    )


def mpi_library_name(text: str) -> str:
    """Return the first line of an MPI library's version text, which may end in a zero."""
    return " ".join(text.split("\n")[0].rstrip("\0").split())


def _number(text: str | None) -> int | None:
    """Return the number that a launcher wrote, or None."""
    return int(text) if text is not None and text.isascii() and text.isdecimal() else None
