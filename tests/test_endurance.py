"""Many runs in a row leave memory, file descriptors and /dev/shm as they were."""

from pathlib import Path

import pytest

import conftest

DRIVER = """
import os, sys
from pathlib import Path
import numpy as np
import worlds
from pympa.mesh import Plan
from pympa.model import Model
from pympa.session import Session
from pympa.spec import DTYPES

RUNS = 300


def held():
    fields = dict(l.split(":") for l in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024, len(os.listdir("/proc/self/fd"))


def one_run():
    with Session("cp=2") as session:
        rank = session.on(Plan(cp=2))
        model = Model(worlds.DENSE, rank, DTYPES["float32"])
        model.forward(model.prepare(worlds.batch(worlds.LENGTHS)))
        rank.arena.close()
        q = np.ones((session.layout([64]).rows, 2, 8), np.float32)
        session.ring_attention(q, q, q, lengths=[64])


for number in range(RUNS):
    one_run()
    if number == 30:
        before = held()
after = held()
assert after[0] - before[0] < 8, (before, after)
assert after[1] == before[1], (before, after)
print(f"from {before} to {after}", flush=True)
"""


@pytest.mark.usefixtures("nothing_left")
def test_300_sessions(tmp_path: Path):
    driver = tmp_path / "driver.py"
    tests = str(Path(__file__).parent)
    driver.write_text(f"import sys\nsys.path.insert(0, {tests!r})\n{DRIVER}")
    job = conftest.run_job(2, str(driver), timeout=180)
    assert job.status == 0, job.err
    assert job.out.count("from (") == 2
