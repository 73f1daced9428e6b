"""Runs the main job and breaks one rank, mostly after the first record; see test_ending.py.

Its first argument is HOW@FILE. The time of the break goes to FILE, for a launcher may lose the last
lines of a rank that ends at once.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from pympa.bench import __main__ as command
from pympa.bench.measure import run as bench
from pympa.bench.measure import truth
from pympa.kernels.cuda import Accelerator
from pympa.session import opening
from pympa.transport.mpi import MpiEndpoint
from support.emulated import EmulatedDevice

HOW, _, MOMENT = sys.argv[1].partition("@")
RANK = 2


def note() -> None:
    """Note the time."""
    Path(MOMENT).write_text(str(time.time()))


def fail() -> None:
    if HOW == "exception":
        raise KeyError("planned failure")
    if HOW == "value":
        raise ValueError("planned: expected 1; got 2")
    if HOW == "exit":
        sys.exit(0)
    if HOW == "hard-exit":
        os._exit(3)
    if HOW == "late":
        time.sleep(3600)
    os.kill(os.getpid(), getattr(signal, HOW))


def open_device(local_index: int, *, timeout_seconds: float) -> Accelerator:
    """Fail on one rank, in a way that nobody expects."""
    if local_index == RANK:
        raise RuntimeError("planned: no device today")
    return Accelerator(EmulatedDevice(timeout_seconds=timeout_seconds), core=None)


def kill_in_its_sleep() -> None:
    """Kill one rank a second after it has begun to rest, while rank 0 computes an oracle."""
    rest, oracle = MpiEndpoint.idle_barrier, truth.oracle

    def breaks(endpoint):
        if endpoint.rank == RANK:
            time.sleep(1)
            note()
            os.kill(os.getpid(), signal.SIGKILL)
        rest(endpoint)

    def takes_long(*rest):
        time.sleep(4)
        return oracle(*rest)

    MpiEndpoint.idle_barrier, truth.oracle = breaks, takes_long


def main() -> int:
    opening.open_accelerator = open_device
    if HOW == "oracle":
        kill_in_its_sleep()
    run_plan, calls = bench.run_plan, []

    def breaks_at_second_plan(team, *rest):
        calls.append(None)
        if len(calls) == 2 and team.rank == RANK:
            note()
            fail()
        return run_plan(team, *rest)

    bench.run_plan = breaks_at_second_plan
    return command.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
