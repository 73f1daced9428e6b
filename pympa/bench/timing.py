"""Timed steps of one rank, and the least that a step can take: where time went, what was sent."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pympa.accounting import roofline_seconds
from pympa.bench.machine import Machine, measure_core, measure_device
from pympa.bench.truth import Job
from pympa.model import Model, Prepared
from pympa.rank import Rank
from pympa.spec import numpy_dtype
from pympa.step import Overlap, mean_times
from pympa.team import Team


@dataclass(frozen=True)
class Timing:
    """This rank's timed steps.

    Attributes:
        seconds: of each step. compute: mean seconds in kernels.
        waits: mean seconds waited, by axis. hidden: mean seconds in flight without waiting.
        overlap: means, by axis. peak_bytes: of the arena, loading included.
        sent, received: bytes of one step by (axis, peer). load: rows sent to experts by layer.
        dropped: choices past an expert's capacity.
    """

    seconds: list[float]
    compute: float
    waits: dict[str, float]
    hidden: float
    overlap: dict[str, Overlap]
    peak_bytes: int
    sent: Counter[tuple[str, int]]
    received: Counter[tuple[str, int]]
    load: dict[int, NDArray[np.int64]]
    dropped: int


def time_steps(
    team: Team,
    rank: Rank,
    model: Model,
    prepared: Prepared,
    options: argparse.Namespace,
    loading_peak: int,
) -> Timing:
    """Time steps of a batch. Collective.

    Args:
        team: the ranks of the model.
        rank: this one's resources.
        model: its part of the model.
        prepared: the batch.
        options: tell how many steps.
        loading_peak: bytes of the arena before the first step, at most.

    Raises:
        RuntimeError: a timed step took new memory.
    """
    rank.arena.restart_peak()  # verification holds copies of the branches; a step does not
    for _ in range(options.warmup):
        model.forward(prepared)
    blocks, steps = rank.arena.blocks, []
    for _ in range(options.iterations):
        team.barrier()
        rank.traffic.clear()
        rank.load.clear()
        model.forward(prepared)
        steps.append(rank.trace.last.times())
    if options.warmup and rank.arena.blocks != blocks:
        raise RuntimeError("the arena grew inside a timed step")
    typical = mean_times(steps)
    return Timing(
        [step.step for step in steps],
        typical.compute,
        typical.waits,
        typical.hidden,
        typical.overlap,
        max(loading_peak, rank.arena.peak_bytes),
        rank.traffic.sent,
        rank.traffic.received,
        rank.load.rows,
        rank.load.dropped.total(),
    )


def measure_machine(team: Team, dtype: str) -> Machine:
    """Measure one core, or GPU, on rank 0 while the others rest. Collective."""

    def measure(first: Team) -> Machine:
        if first.accelerator is None:
            return measure_core(dtype, first.isa)
        return measure_device(first.accelerator, numpy_dtype(dtype))

    return team.on_first(1, measure)


def roofline(job: Job, team: Team, machine: Machine, ranks: int | None = None) -> float:
    """Return the seconds that a step takes at least on the cores, or GPUs, of the ranks at work.

    Args:
        job: model, batch and dtype.
        team: whose cores these are.
        machine: one of them.
        ranks: that work, of the team; None means all.
    """
    return roofline_seconds(
        job.size.model,
        job.size.lengths,
        job.dtype.itemsize,
        flops_per_second=machine.flops_per_second,
        bytes_per_second=machine.bytes_per_second,
        cores=min((ranks or team.size) * team.threads, team.processors),
    )
