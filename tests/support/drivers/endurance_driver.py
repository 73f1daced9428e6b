"""Opens many sessions in a row, and fails if what a rank holds grows; see test_endurance.py.

Its argument is their number.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from pympa import Session
from pympa.model.model import Model
from pympa.plan.mesh import Plan
from pympa.spec import DTYPES
from support import worlds

WARM_UP = 30  # after which nothing may grow
MOST_MEGABYTES = 8


def held() -> tuple[float, int]:
    """Return the megabytes and the file descriptors of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":") for line in lines)
    return int(fields["VmRSS"].split()[0]) / 1024, len(os.listdir("/proc/self/fd"))


def one_run() -> None:
    """Open a session, run a step and attention, and close it."""
    with Session("cp=2") as session:
        rank = session.team.resources(Plan(cp=2))
        model = Model(worlds.DENSE, rank, DTYPES["float32"])
        model.forward(model.prepare(worlds.batch(worlds.LENGTHS)))
        rank.arena.close()
        q = np.ones((session.layout([64]).rows, 2, 8), np.float32)
        session.ring_attention(q, q, q, lengths=[64])


def main(runs: int) -> None:
    """Run them all."""
    for number in range(runs):
        one_run()
        if number == WARM_UP:
            before = held()
    after = held()
    assert after[0] - before[0] < MOST_MEGABYTES, (before, after)
    assert after[1] == before[1], (before, after)
    print(f"from {before} to {after}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
