"""Starts the MPI part of the suite itself, on 2, 4, 7 and 16 ranks."""

import pytest

from support.jobs import run_job
from support.lanes import lanes


@pytest.mark.parametrize("ranks", lanes([2, 4, 7, 16], [1]))
def test_mpi_suite(ranks, full_lane):
    lane = ["--full"] if full_lane else []
    # Once without the folder, as CONTRIBUTING.md says: ranks deselect all else, in the same order.
    folder = [] if full_lane and ranks == 4 else ["tests/transport/mpi"]
    job = run_job(
        ranks, "-m", "pytest", "--with-mpi", "-q", "-x", "-p", "no:cacheprovider", *lane, *folder,
        timeout=400,
    )  # fmt: skip
    assert job.status == 0, job.out[-6000:] + job.err[-3000:]
    assert " passed" in job.out
    assert " failed" not in job.out
