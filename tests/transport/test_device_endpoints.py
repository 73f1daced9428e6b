"""What messages between devices keep to, by NCCL and through the host's memory."""

import pytest

from support import device_checks
from support.device_worlds import run_over_nccl, run_staged
from support.lanes import lanes

BOTH = pytest.mark.parametrize("run", [run_over_nccl, run_staged], ids=["nccl", "staged"])


@BOTH
@pytest.mark.parametrize("seed", lanes(range(4), [0]))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("check", device_checks.EVERYWHERE)
def test_endpoint(check, size, seed, run):
    run(size, seed, check)


@BOTH
def test_repeats_take_nothing_new(run):
    run(3, 1, device_checks.repeats_take_nothing_new)


@BOTH
def test_the_emulation_shows_a_wait_that_is_missing(run):
    device_checks.missing_waits_show(run)
