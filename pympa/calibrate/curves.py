"""Curves of the kernels of this rank's team, all ranks at work at once, and of Python between."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pympa.calibrate.interpreter import LARGE_BYTES, SMALL_BYTES, between_kernels
from pympa.calibrate.stopwatch import Bench
from pympa.calibrate.workloads import WORKLOADS, Workload
from pympa.curves import Curve
from pympa.spec import numpy_dtype
from pympa.team import Team

_FOR_EVER = 1 << 60  # bytes: beyond `LARGE_BYTES` nothing changes
_PASSES = 2  # of which the faster counts: other work on the machine seldom meets both


def measure_curves(team: Team, dtype: str, tell: Callable[[str], None]) -> list[Curve]:
    """Measure every kernel in one dtype. Collective.

    Args:
        team: all of it works at once; a curve's seconds are the mean of its ranks'.
        dtype: of weights and activations.
        tell: hears what is measured now.
    """
    tell(f"kernels in {dtype}, ranks at once: {team.size}")
    bench = Bench(numpy_dtype(dtype), team.isa)
    passes = [[_measure(team, bench, workload) for workload in WORKLOADS] for _ in range(_PASSES)]
    bench.arena.close()
    curves = [
        _curve(team, workload.kernel, dtype, workload.sizes, list(np.min(found, axis=0)))
        for workload, *found in zip(WORKLOADS, *passes, strict=True)
    ]
    return [*curves, _between(team, dtype)]


def _measure(team: Team, bench: Bench, workload: Workload) -> list[float]:
    """Return this rank's seconds at each point of the grid. Collective."""
    found = []
    for point in itertools.product(*workload.sizes):
        make = partial(workload.make, bench, *point)
        seconds = bench.seconds(make, team.barrier, workload.pool_bytes)
        if workload.less is not None:
            seconds -= bench.seconds(partial(workload.less, bench, *point), team.barrier)
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
    """Measure Python between kernels. Collective."""
    small, large = (between_kernels(team, dtype, large=large) for large in (False, True))
    sizes = (SMALL_BYTES, LARGE_BYTES, _FOR_EVER)
    return _curve(team, "between", dtype, (sizes,), [small, large, large])


def device_peaks(isa: str, dtypes: list[str]) -> tuple[dict[str, float], float]:
    """Return what one core does at best: flop/s by dtype, bytes/s."""
    from pympa.bench.machine import measure_core

    machines: dict[str, Any] = {dtype: measure_core(dtype, isa) for dtype in dtypes}
    flops = {dtype: float(f"{m.flops_per_second:.4g}") for dtype, m in machines.items()}
    return flops, float(f"{max(m.bytes_per_second for m in machines.values()):.4g}")
