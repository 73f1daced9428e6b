"""Timed steps of one rank, and the least time that a step can take."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pympa.bench.measure.truth import Job
from pympa.kernels.peaks import Machine, measure_core, measure_device
from pympa.model.model import Model, Prepared
from pympa.model.resources import RankResources, RankStep
from pympa.plan.accounting import roofline_seconds
from pympa.runtime.step import mean_times
from pympa.session.team import Team
from pympa.spec import numpy_dtype


@dataclass(frozen=True)
class TimedSteps(RankStep):
    """The timed steps of this rank: mean times, and the traffic of the last step.

    Attributes:
        seconds: the seconds of each step.
        load: the rows sent to each expert in a step, by layer.
        dropped: the number of choices that exceeded an expert's capacity.
    """

    seconds: list[float]
    load: dict[int, NDArray[np.int64]]
    dropped: int


def warmup_steps(options: argparse.Namespace) -> int:
    """Return the number of steps before timing; a step that was verified is one itself."""
    if options.warmup is None:
        return 1 if options.no_verify else 0
    return int(options.warmup)


def time_steps(
    team: Team,
    resources: RankResources,
    model: Model,
    prepared: Prepared,
    options: argparse.Namespace,
    loading_peak: int,
) -> TimedSteps:
    """Time steps of a batch. Collective.

    Args:
        team: the ranks of the model.
        resources: the resources of this rank.
        model: this rank's part of the model.
        prepared: the batch.
        options: the options, with the number of steps.
        loading_peak: the largest number of arena bytes in use before the first step.

    Raises:
        RuntimeError: a timed step allocated new memory.
    """
    resources.arena.restart_peak()  # verification keeps copies of the branches; a step does not
    for _ in range(warmup_steps(options)):
        model.forward(prepared)
    blocks, steps = resources.arena.blocks, []
    for _ in range(options.iterations):
        team.barrier()
        resources.traffic.clear()
        resources.load.clear()
        model.forward(prepared)
        steps.append(resources.trace.last.times())
    warm = warmup_steps(options) or not options.no_verify
    if warm and resources.arena.blocks != blocks:
        raise RuntimeError("the arena grew inside a timed step")
    return TimedSteps(
        mean_times(steps),
        resources.traffic.copy(),
        max(loading_peak, resources.arena.peak_bytes),
        [step.step for step in steps],
        resources.load.rows,
        resources.load.dropped.total(),
    )


class Machines:
    """The rates of one core, or GPU, measured once for each dtype.

    Args:
        team: all ranks.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self._found: dict[str, Machine] = {}

    def of(self, dtype: str) -> Machine:
        """Return the rates; rank 0 measures while the other ranks wait. Collective."""

        def measure(first: Team) -> Machine:
            if first.accelerator is None:
                return measure_core(dtype, first.isa)
            return measure_device(first.accelerator, numpy_dtype(dtype))

        if dtype not in self._found:
            self._found[dtype] = self._team.on_first(1, measure)
        return self._found[dtype]


def roofline(job: Job, team: Team, machine: Machine, ranks: int | None = None) -> float:
    """Return the least seconds that a step takes on the cores, or GPUs, of the ranks.

    Args:
        job: the model, batch and dtype.
        team: the team whose cores are used.
        machine: the rates of one core or GPU.
        ranks: the number of ranks of the team that compute; None means all.
    """
    return roofline_seconds(
        job.size.model,
        job.size.lengths,
        job.dtype.itemsize,
        flops_per_second=machine.flops_per_second,
        bytes_per_second=machine.bytes_per_second,
        cores=min((ranks or team.size) * team.threads, team.processors),
    )
