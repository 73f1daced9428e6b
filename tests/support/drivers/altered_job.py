"""Runs the main job with one thing changed on all ranks, or on one: the first argument says what.

As `WHAT` or `WHAT=VALUE`; all further arguments are those of the job.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from mpi4py import MPI

from pympa.bench.__main__ import main
from pympa.bench.experiment import description
from pympa.bench.measure import room as checks
from pympa.bench.measure import run
from pympa.kernels.cpu import CpuKernels
from pympa.session import room

LONG_SECONDS = 811505.0


def available(size: str) -> None:
    """Let every node have so many bytes."""
    room.memory_limits = lambda: {"node here": int(size)}


def long_steps(plan: str) -> None:
    """Let steps of one plan take nine days."""
    roofline, too_long, in_hand = run.roofline, run._too_long, [""]

    def slow(job, team, machine, ranks=None):
        return LONG_SECONDS if in_hand == [plan] else roofline(job, team, machine, ranks)

    def asked(session, candidate, machine, options):
        in_hand[:] = [str(candidate.variants[0])]
        return too_long(session, candidate, machine, options)

    run.roofline, run._too_long = slow, asked


def wrong_sums(_: str) -> None:
    """Lose the first row of every sum of two arrays."""
    add = CpuKernels.add

    def wrong(self, a, b, out):
        add(self, a, b, out)
        if out.flags.writeable:  # not in the rehearsal on shapes
            out[0] = 0

    CpuKernels.add = wrong


def no_oracle(_: str) -> None:
    """Let no whole oracle be small enough."""
    checks.WHOLE_ORACLE_FLOPS = 0


def failing_rank(rank: str) -> None:
    """Let one rank fail in its first RoPE."""
    rope = CpuKernels.rope

    def fails(self, x, *rest, **how):
        if x.flags.writeable and MPI.COMM_WORLD.Get_rank() == int(rank):
            raise OSError("the disk is on fire")
        rope(self, x, *rest, **how)

    CpuKernels.rope = fails


def other_arguments(rank: str) -> None:
    """Give one rank another command line."""
    if MPI.COMM_WORLD.Get_rank() == int(rank):
        sys.argv[2:] = ["--list"]


def killed_in_reading(_: str) -> None:
    """Kill each rank when it reads its first file."""
    description.read_description = lambda name: os.kill(os.getpid(), signal.SIGKILL)


CHANGES: dict[str, Callable[[str], None]] = {
    change.__name__: change
    for change in (
        available, long_steps, wrong_sums, no_oracle, failing_rank, other_arguments,
        killed_in_reading,
    )
}  # fmt: skip

if __name__ == "__main__":
    what, _, value = sys.argv[1].partition("=")
    CHANGES[what](value)
    sys.exit(main(sys.argv[2:]))
