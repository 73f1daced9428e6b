"""Joules a token: one counter for each GPU, over steps that are not timed."""

from types import SimpleNamespace
from typing import Any

import pytest

from pympa.bench.measure.energy import WINDOW_SECONDS, joules_per_token, open_counter
from pympa.errors import RefusedError
from pympa.hardware.cores import Placement
from pympa.kernels.cuda import Accelerator
from pympa.session.team import Team
from pympa.transport.local import LocalWorld


class NvmlError(Exception):
    pass


def fake_nvml(millijoules: list[int], *, broken: str = "") -> Any:
    """Stand for pynvml; each look at the counter takes the next figure."""

    def call(name: str, result: Any = None) -> Any:
        def run(*arguments: Any) -> Any:
            if name == broken:
                raise NvmlError("Not Supported")
            return result(*arguments) if callable(result) else result

        return run

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=call("nvmlInit"),
        nvmlDeviceGetHandleByPciBusId=call("nvmlDeviceGetHandleByPciBusId", lambda bus_id: bus_id),
        nvmlDeviceGetTotalEnergyConsumption=call(
            "nvmlDeviceGetTotalEnergyConsumption", lambda handle: millijoules.pop(0)
        ),
    )


def test_counter_gives_joules():
    counter = open_counter("0000:01:00.0", fake_nvml([5, 2000, 4500]))
    assert [counter(), counter()] == [2.0, 4.5]


@pytest.mark.parametrize(
    "broken",
    ["nvmlInit", "nvmlDeviceGetHandleByPciBusId", "nvmlDeviceGetTotalEnergyConsumption"],
)
def test_a_gpu_without_counter_is_refused(broken):
    with pytest.raises(RefusedError, match=r"no energy counter of GPU 0000:01:00.0.*Not Supported"):
        open_counter("0000:01:00.0", fake_nvml([1], broken=broken))


def team_of(endpoint: Any, bus_ids: list[str]) -> Team:
    """Return ranks of one node with a GPU each."""
    gpus = [Placement("node", frozenset({bus_id})) for bus_id in bus_ids]
    device = SimpleNamespace(bus_id=bus_ids[endpoint.rank])
    accelerator = Accelerator(device, core=None)
    return Team(endpoint, gpus, 1, "cuda", "MPI", accelerator=accelerator, gpus=gpus)


def measure(endpoint: Any, bus_ids: list[str], opened: list[str]) -> tuple[float, int]:
    """Return joules a token and the steps of one rank: each step of a rank takes 6 J."""
    team = team_of(endpoint, bus_ids)
    steps: list[int] = []

    def counter_of(bus_id: str) -> Any:
        opened.append(bus_id)
        return lambda: 100.0 + 6.0 * len(steps)

    found = joules_per_token(
        team, lambda: steps.append(0), tokens=3, step_seconds=0.3, open_counter=counter_of
    )
    return found, len(steps)


def test_gpus_that_ranks_share_count_once():
    opened: list[str] = []
    bus_ids = ["a", "b", "a", "b"]
    results = LocalWorld(4).run(lambda e: measure(e, bus_ids, opened))
    assert sorted(opened) == ["a", "b"]
    steps = -(-WINDOW_SECONDS // 0.3)
    assert results == [(2 * 6.0 / 3, steps)] * 4


def test_ranks_agree_that_a_counter_is_missing():
    def refused(endpoint: Any) -> str:
        team = team_of(endpoint, [str(rank) for rank in range(endpoint.size)])

        def missing(bus_id: str) -> Any:
            if bus_id == "1":
                raise RefusedError("--energy: no counter")
            return lambda: 0.0

        with pytest.raises(RefusedError, match="no counter") as error:
            joules_per_token(team, lambda: None, tokens=1, step_seconds=1.0, open_counter=missing)
        return str(error.value)

    assert LocalWorld(2).run(refused) == ["--energy: no counter"] * 2
