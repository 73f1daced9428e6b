"""Many runs in a row leave memory, file descriptors and /dev/shm as they were."""

import pytest

from support.jobs import driver, run_job
from support.lanes import full


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("sessions", [60, *full(300)])
def test_sessions_in_a_row(sessions):
    job = run_job(2, driver("endurance_driver"), str(sessions), timeout=180)
    assert job.status == 0, job.err
    assert job.out.count("from (") == 2, "each rank tells what it held before and after"
