"""Joules of GPUs for each token, from the total energy counter of each GPU.

NVML reads the counter, in millijoules since the driver was loaded; it changes about every 100 ms.
So steps are repeated for seconds, apart from the timed steps. A GPU counts once, even if several
ranks share it. The counter includes all energy of the board: idle power, too, and other programs,
if any run.
"""

from __future__ import annotations

import importlib
import math
import platform
from collections.abc import Callable
from typing import Any

from pympa.errors import RefusedError
from pympa.session.team import Team

WINDOW_SECONDS = 2.0
"""Twenty times the interval in which the counter changes."""

Counter = Callable[[], float]
"""A function that returns the joules that a GPU has used so far."""


def open_counter(bus_id: str, nvml: Any = None) -> Counter:
    """Return the counter of one GPU.

    Args:
        bus_id: the address of the GPU on the PCI bus.
        nvml: a module to use instead of `pynvml`.

    Raises:
        RefusedError: NVML is not installed, or the GPU has no such counter.
    """
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError as error:
            raise RefusedError(
                f"--energy: {error}; install it with: pip install nvidia-ml-py"
            ) from None
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError as error:
        raise RefusedError(
            f"--energy: NVML reads no energy counter of GPU {bus_id}: {error}"
        ) from None
    return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3


def joules_per_token(
    team: Team,
    step: Callable[[], object],
    *,
    tokens: int,
    step_seconds: float,
    open_counter: Callable[[str], Counter] = open_counter,
) -> float:
    """Repeat a step and return the joules for each token, of all GPUs of the team. Collective.

    Args:
        team: the ranks, each with a GPU.
        step: a function that runs one step and returns when the device has finished it.
        tokens: the number of tokens of a step.
        step_seconds: the seconds that a step takes, the same on all ranks.
        open_counter: a function like `open_counter`.

    Raises:
        RefusedError: a GPU has no counter, or the team has no GPU.
    """
    if team.accelerator is None:
        raise RefusedError("--energy needs --backend cuda: only GPUs have an energy counter")
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
