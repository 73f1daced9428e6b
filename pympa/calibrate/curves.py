"""Curves of kernels while all ranks of the team compute, and of Python between kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pympa.calibrate.interpreter import LARGE_BYTES, SMALL_BYTES, between_kernels
from pympa.calibrate.stopwatch import Stopwatch
from pympa.costs.curves import Curve
from pympa.kernels.ops import OPS
from pympa.kernels.rig import Rig
from pympa.kernels.workloads import Workload
from pympa.session.team import Team
from pympa.spec import numpy_dtype

_UNLIMITED_BYTES = 1 << 60  # the curve is constant above `LARGE_BYTES`
_PASSES = 2  # the faster one counts: other programs seldom disturb both


def measure_curves(team: Team, dtype: str, progress: Callable[[str], None]) -> list[Curve]:
    """Measure every kernel in one dtype. Collective.

    Args:
        team: the team; all its ranks compute at once, and a curve has the mean of their seconds.
        dtype: the dtype of weights and activations.
        progress: a function that is called with a text about the next measurement.
    """
    progress(f"kernels in {dtype}, ranks at once: {team.size}")
    rig = Rig(numpy_dtype(dtype), isa=team.isa)
    workloads = [workload for op in OPS for workload in op.workloads]
    passes = [[_measure(team, rig, workload) for workload in workloads] for _ in range(_PASSES)]
    rig.arena.close()
    curves = [
        _curve(team, workload.curve, dtype, workload.sizes, list(np.min(found, axis=0)))
        for workload, *found in zip(workloads, *passes, strict=True)
    ]
    return [*curves, _between(team, dtype)]


def _measure(team: Team, rig: Rig, workload: Workload) -> list[float]:
    """Return this rank's seconds at each point of the grid. Collective."""
    found, stopwatch = [], Stopwatch(rig)
    for point in itertools.product(*workload.sizes):
        make = partial(workload.make, rig, *point)
        seconds = stopwatch.seconds(make, team.barrier, workload.pool_bytes)
        if workload.less is not None:
            seconds -= stopwatch.seconds(partial(workload.less, rig, *point), team.barrier)
        found.append(max(0.0, seconds / workload.parts))
    return found


def _curve(
    team: Team,
    kernel: str,
    dtype: str,
    sizes: tuple[tuple[int, ...], ...],
    mine: list[float],
) -> Curve:
    """Return the curve of all ranks' seconds. Collective."""
    seconds = np.mean(team.world.gather_objects(mine), axis=0)
    rounded = tuple(float(f"{value:.4g}") for value in seconds)
    return Curve(kernel=kernel, dtype=dtype, ranks=team.size, sizes=sizes, seconds=rounded).judged()


def _between(team: Team, dtype: str) -> Curve:
    """Measure the seconds of Python between kernels. Collective."""
    small, large = (between_kernels(team, dtype, large=large) for large in (False, True))
    sizes = (SMALL_BYTES, LARGE_BYTES, _UNLIMITED_BYTES)
    return _curve(team, "between", dtype, (sizes,), [small, large, large])


def device_peaks(isa: str, dtypes: list[str]) -> tuple[dict[str, float], float]:
    """Return the peak rates of one core: flop/s by dtype, and bytes/s."""
    from pympa.kernels.peaks import measure_core

    machines: dict[str, Any] = {dtype: measure_core(dtype, isa) for dtype in dtypes}
    flops = {dtype: float(f"{m.flops_per_second:.4g}") for dtype, m in machines.items()}
    return flops, float(f"{max(m.bytes_per_second for m in machines.values()):.4g}")
