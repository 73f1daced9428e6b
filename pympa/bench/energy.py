"""Joules of GPUs for a token, by the counter of its total energy that each of them keeps.

NVML shows the counter, in millijoules since the driver was loaded; it moves about every 100 ms. So
steps are repeated for seconds, apart from those that are timed. A GPU counts once, whatever the
number of ranks that share it, and counts all that is on its board: idle power too, and other
programs, if there are any.
"""

from __future__ import annotations

import importlib
import math
import platform
from collections.abc import Callable
from typing import Any

from pympa.errors import RefusedError
from pympa.team import Team

WINDOW_SECONDS = 2.0
"""Twenty times what the counter takes to move."""

Counter = Callable[[], float]
"""Returns the joules that a GPU has used so far."""


def open_counter(bus_id: str, nvml: Any = None) -> Counter:
    """Return the counter of one GPU.

    Args:
        bus_id: of the GPU on the PCI bus.
        nvml: in place of the module `pynvml`.

    Raises:
        RefusedError: there is no NVML, or the GPU keeps no such counter.
    """
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError as error:
            raise RefusedError(f"--energy: {error}; pip install nvidia-ml-py") from None
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError as error:
        raise RefusedError(f"--energy: GPU {bus_id} shows no energy counter: {error}") from None
    return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3


def joules_per_token(
    team: Team,
    step: Callable[[], object],
    *,
    tokens: int,
    step_seconds: float,
    open_counter: Callable[[str], Counter] = open_counter,
) -> float:
    """Repeat a step and return the joules of all GPUs of the team for a token. Collective.

    Args:
        team: ranks with GPUs.
        step: runs one, and returns when the device is through with it.
        tokens: of a step.
        step_seconds: that one takes, the same on all ranks.
        open_counter: see `open_counter`.

    Raises:
        RefusedError: some GPU shows no counter, or the team has none.
    """
    if team.accelerator is None:
        raise RefusedError("--energy is of --backend cuda: GPUs have the counter")
    bus_id = team.accelerator.device.bus_id
    users = team.world.gather_objects((platform.node(), bus_id))
    reads = users.index(users[team.rank]) == team.rank
    counter = team.check(lambda: open_counter(bus_id) if reads else None)
    steps = max(1, math.ceil(WINDOW_SECONDS / step_seconds))
    team.barrier()
    before = counter() if counter else 0.0
    for _ in range(steps):
        step()
    team.barrier()
    used = counter() - before if counter else 0.0
    return float(sum(team.world.gather_objects(used))) / (steps * tokens)
