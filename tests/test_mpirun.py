"""Starts the MPI part of the suite itself, on 2, 4, 7 and 16 ranks."""

import pytest

import conftest


@pytest.mark.parametrize("ranks", [2, 4, 7, 16])
def test_mpi_suite(ranks):
    job = conftest.run_job(
        ranks, "-m", "pytest", "--with-mpi", "-q", "-x", "-p", "no:cacheprovider", "tests/mpi",
        timeout=400,
    )  # fmt: skip
    assert job.status == 0, job.out[-6000:] + job.err[-3000:]
    assert " passed" in job.out
    assert " failed" not in job.out
