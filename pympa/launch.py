"""What launchers and MPI libraries tell: how many tasks there are, which this is, whose they are.

A launcher and an MPI library that do not know each other start many worlds of one rank, each of
which would do all the work alone and succeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pympa.errors import RefusedError


class Tasks(NamedTuple):
    """Tasks that a launcher started: how many, the number of this one, and by what."""

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
    """Return the most tasks that any launcher tells of; one where there is none.

    PMIx tells a task its number only, so the others are as many as that at least.
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
        size: ranks of the world.
        environment: of this process.

    Raises:
        RefusedError: with the launch line that would work.
    """
    tasks = launched_tasks(environment)
    if size > 1 or tasks.total == 1:
        return
    count = "more" if tasks.launcher.endswith("PMIx") else str(tasks.total)
    raise RefusedError(
        f"this {tasks.launcher} has {count} tasks, but MPI sees a world of one rank: launcher and "
        "MPI library do not know each other; take the mpirun of the library that mpi4py uses "
        f"(pympa info names it), or under Slurm srun --mpi=pmi2 -K1 -n {tasks.total} python -m ..."
    )


def mpi_library_name(told: str) -> str:
    """Return the first line of what an MPI library tells of itself, which may end in a zero."""
    return " ".join(told.split("\n")[0].rstrip("\0").split())


def _number(text: str | None) -> int | None:
    """Return a number that a launcher wrote, or None."""
    return int(text) if text is not None and text.isascii() and text.isdecimal() else None
