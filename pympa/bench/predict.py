"""Predict a step on a cluster that is not here: the same strategies, on virtual clocks."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np

from pympa.backend import Rehearsal, build_virtual_rank
from pympa.bench.experiment import PlannedRun, Size
from pympa.cluster import Cluster
from pympa.costs import costs_of
from pympa.kernels.cpu import supported_isas
from pympa.loops import Beat
from pympa.mesh import Plan
from pympa.model import Model
from pympa.partition import Bounds
from pympa.spec import numpy_dtype
from pympa.step import Step, Times
from pympa.virtual import Slow, VirtualEndpoint, VirtualWorld

MOST_MICRO_BATCHES = 128
_STEADY = 1e-4  # relative change between passes below which others may be left out
_FEWEST_PASSES = 2
_CLEARLY_SLOWER = 0.9


@dataclass(frozen=True)
class SimulatedRow:
    """One row of an experiment's table on a cluster.

    Attributes:
        planned: the row as the file has it. plan: for the ranks that it takes.
        size: model and batch. stages: layers of each stage.
    """

    planned: PlannedRun
    plan: Plan
    size: Size
    stages: Bounds


class OfRank(NamedTuple):
    """What one virtual rank did in a step: see `pympa.step` and `pympa.transport.Traffic`.

    layers: passes through layers, and how many of them were simulated. step: what it did when, if
    it was asked to keep that.
    """

    times: Times
    sent: Counter[tuple[str, int]]
    received: Counter[tuple[str, int]]
    peak_bytes: int
    layers: int
    simulated_layers: int
    step: Step | None


@dataclass(frozen=True)
class Prediction:
    """One plan on a cluster, on virtual clocks.

    Attributes:
        plan: that was simulated. ranks: what each did.
        watts: board power of a rank.
        transport_calls: that the simulation took.
        drift: see `Beat`.
    """

    plan: Plan
    ranks: tuple[OfRank, ...]
    watts: float
    transport_calls: int
    drift: float

    @property
    def step_seconds(self) -> float:
        """Of the slowest rank."""
        return max(rank.times.step for rank in self.ranks)

    @property
    def waiting_seconds(self) -> float:
        """Of the rank that waits most."""
        return max(sum(rank.times.waits.values()) for rank in self.ranks)

    @property
    def bytes_sent(self) -> int:
        """By all ranks."""
        return sum(rank.sent.total() for rank in self.ranks)

    @property
    def peak_bytes(self) -> int:
        """Of the arena of the rank that needs most."""
        return max(rank.peak_bytes for rank in self.ranks)

    @property
    def joules(self) -> float:
        """Board power × time in kernels, of all ranks; a rank that waits counts nothing."""
        return self.watts * sum(rank.times.compute for rank in self.ranks)

    @property
    def layers(self) -> tuple[int, int]:
        """Passes through layers that one rank simulated, and how many there were."""
        most = max(self.ranks, key=lambda rank: rank.layers)
        return most.simulated_layers, most.layers


def predict(
    size: Size,
    plan: Plan,
    dtype: str,
    cluster: Cluster,
    slow: Slow | None = None,
    *,
    stages: Bounds | None = None,
    loads: Sequence[float] | None = None,
    whole: bool = False,
) -> Prediction:
    """Run one step of a plan on shapes and clocks.

    Of layers, chunks of rows and micro-batches that are alike as few are simulated as it takes
    for two to take the same time on all ranks; the others go by what these did.

    Args:
        size: model and batch.
        plan: of at most the cluster's ranks.
        dtype: of weights and activations.
        cluster: what ranks compute with and how they are linked.
        slow: which ranks and links are slower.
        stages: layers of each stage; None means `stage_bounds` at its default context.
        loads: rows of each expert, in any unit; None means even ones.
        whole: simulate everything, and keep what each rank did when.
    """
    passes = None if whole else _FEWEST_PASSES
    while True:
        beat = Beat(passes)
        found = _simulate(size, plan, dtype, cluster, slow, stages, loads, beat)
        if passes is None or beat.drift <= _STEADY:
            return found
        passes += 1 if passes < 4 else passes


def fastest(
    run: Callable[[Plan], Prediction], row: SimulatedRow, dtype: str, cluster: Cluster
) -> Prediction:
    """Return the prediction of the best number of micro-batches, where a family leaves it open.

    The fewest, by powers of two, that fit into the devices' memory, and with stages more until
    more are clearly slower.

    Args:
        run: predicts a plan of the row.
        row: of a table.
        dtype: of weights and activations.
        cluster: whose devices' memory counts.
    """
    if row.planned.family is None:
        return run(row.plan)
    size, plan = row.size, row.plan
    most = min(MOST_MICRO_BATCHES, sum(size.lengths) if size.model.causal else size.batch)
    variants = [
        msgspec.structs.replace(plan, micro_batches=1 << power)
        for power in range(most.bit_length())
    ]
    fitting = (i for i, variant in enumerate(variants) if _fits(row, variant, dtype, cluster))
    first = next(fitting, 0)
    best = run(variants[first])
    for variant in variants[first + 1 :] if plan.pp > 1 else []:
        found = run(variant)
        best = min(best, found, key=lambda prediction: prediction.step_seconds)
        if found.step_seconds * _CLEARLY_SLOWER > best.step_seconds:
            break
    return best


def _fits(row: SimulatedRow, plan: Plan, dtype: str, cluster: Cluster) -> bool:
    """Tell whether the first ranks of the first and the last stage have memory enough."""
    costs, isa = costs_of(cluster.device, dtype, plan.world), supported_isas()[0]
    for rank in {0, plan.world - plan.stage_ranks}:
        rehearsal = Rehearsal(
            row.size.model,
            plan,
            rank,
            numpy_dtype(dtype),
            isa=isa,
            stages=row.stages,
            costs=costs,
        )
        rehearsal.step(row.size.lengths)
        if rehearsal.arena.peak_bytes > cluster.device.memory_bytes:
            return False
    return True


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the cyclic garbage collector: a simulation makes millions of objects and no cycles."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _simulate(
    size: Size,
    plan: Plan,
    dtype: str,
    cluster: Cluster,
    slow: Slow | None,
    stages: Bounds | None,
    loads: Sequence[float] | None,
    beat: Beat,
) -> Prediction:
    ids = [np.broadcast_to(np.int32(0), (length,)) for length in size.lengths]
    costs, isa = costs_of(cluster.device, dtype, plan.world), supported_isas()[0]

    def body(endpoint: VirtualEndpoint) -> OfRank:
        rank = build_virtual_rank(endpoint, plan, costs, isa=isa, beat=beat, loads=loads)
        model = Model(size.model, rank, numpy_dtype(dtype), stages=stages)
        prepared = model.prepare(ids)
        model.forward(prepared)
        passes = len(model.layers) * len(prepared.batch.micro_batches)
        return OfRank(
            rank.trace.last.times(),
            rank.traffic.sent,
            rank.traffic.received,
            rank.arena.peak_bytes,
            passes,
            beat.layers[endpoint.rank],
            rank.trace.last if beat.passes is None else None,
        )

    world = VirtualWorld(plan.world, cluster, slow)
    with _without_collector():
        ranks = tuple(world.run(body))
    return Prediction(plan, ranks, cluster.device.watts, world.calls, beat.drift)
