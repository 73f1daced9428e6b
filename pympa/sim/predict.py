"""Predict a step on a simulated cluster: the strategies' own code, on virtual clocks."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from pympa.costs.cluster import Cluster
from pympa.costs.device_costs import costs_of
from pympa.kernels.cpu import isa_of_profile
from pympa.model.model import Model
from pympa.model.resources import RankStep
from pympa.plan.mesh import Plan
from pympa.plan.partition import Stages
from pympa.runtime.step import Step
from pympa.sim.loops import Extrapolation
from pympa.sim.resources import virtual_resources
from pympa.sim.world import Slow, VirtualEndpoint, VirtualWorld
from pympa.spec import ModelSpec, numpy_dtype

_STEADY = 1e-4  # relative difference between passes below which the others are extrapolated
_FEWEST_PASSES = 2


@dataclass(frozen=True)
class SimulatedStep(RankStep):
    """The simulated step of one rank.

    Attributes:
        layers: the number of passes through layers.
        simulated_layers: the number of those passes that were simulated.
        step: the spans of the step, if the caller asked for them.
    """

    layers: int
    simulated_layers: int
    step: Step | None


@dataclass(frozen=True)
class Prediction:
    """The simulated step of one plan on a cluster.

    Attributes:
        plan: the simulated plan.
        ranks: the simulated step of each rank.
        watts: the board power of a rank.
        transport_calls: the number of transport calls in the simulation.
        drift: the largest difference between passes, see `Extrapolation`.
    """

    plan: Plan
    ranks: tuple[SimulatedStep, ...]
    watts: float
    transport_calls: int
    drift: float

    @property
    def step_seconds(self) -> float:
        """The seconds of a step on the slowest rank."""
        return max(rank.times.step for rank in self.ranks)

    @property
    def waiting_seconds(self) -> float:
        """The seconds that the rank that waits most waits."""
        return max(sum(rank.times.waits.values()) for rank in self.ranks)

    @property
    def bytes_sent(self) -> int:
        """The bytes sent by all ranks."""
        return sum(rank.traffic.sent.total() for rank in self.ranks)

    @property
    def peak_bytes(self) -> int:
        """The arena's peak on the rank that needs most."""
        return max(rank.peak_bytes for rank in self.ranks)

    @property
    def joules(self) -> float:
        """Board power × time in kernels, of all ranks; waiting counts as 0."""
        return self.watts * sum(rank.times.compute for rank in self.ranks)

    @property
    def layers(self) -> tuple[int, int]:
        """The numbers of simulated and of all passes through layers, on one rank."""
        most = max(self.ranks, key=lambda rank: rank.layers)
        return most.simulated_layers, most.layers


def predict(
    spec: ModelSpec,
    lengths: Sequence[int],
    plan: Plan,
    dtype: str,
    cluster: Cluster,
    slow: Slow | None = None,
    *,
    stages: Stages | None = None,
    loads: Sequence[float] | None = None,
    whole: bool = False,
) -> Prediction:
    """Simulate one step of a plan on shapes and virtual clocks.

    Of equal layers, chunks of rows and micro-batches only as many are simulated as are needed until
    two of them take the same time on all ranks; the others are extrapolated.

    Args:
        spec: the model.
        lengths: the number of tokens of each sequence.
        plan: a plan of at most the cluster's number of ranks.
        dtype: the dtype of weights and activations.
        cluster: the devices of the ranks and the links between them.
        slow: the ranks and links that are slower.
        stages: the layers of each stage; None means `stage_bounds` at its default context.
        loads: the rows of each expert, in any unit; None means even loads.
        whole: whether everything is simulated and the spans of each rank are kept.
    """
    passes = None if whole else _FEWEST_PASSES
    while True:
        extrapolation = Extrapolation(passes)
        found = _simulate(spec, lengths, plan, dtype, cluster, slow, stages, loads, extrapolation)
        if passes is None or extrapolation.drift <= _STEADY:
            return found
        passes += 1 if passes < 4 else passes


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the cyclic garbage collector: a simulation makes millions of objects but no cycles."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _simulate(
    spec: ModelSpec,
    lengths: Sequence[int],
    plan: Plan,
    dtype: str,
    cluster: Cluster,
    slow: Slow | None,
    stages: Stages | None,
    loads: Sequence[float] | None,
    extrapolation: Extrapolation,
) -> Prediction:
    ids = [np.broadcast_to(np.int32(0), (length,)) for length in lengths]
    costs = costs_of(cluster.device, dtype, plan.world)
    isa = isa_of_profile(cluster.isa)

    def body(endpoint: VirtualEndpoint) -> SimulatedStep:
        rank = virtual_resources(
            endpoint, plan, costs, isa=isa, extrapolation=extrapolation, loads=loads
        )
        model = Model(spec, rank, numpy_dtype(dtype), stages=stages)
        prepared = model.prepare(ids)
        model.forward(prepared)
        passes = len(model.layers) * len(prepared.batch.micro_batches)
        return SimulatedStep(
            rank.trace.last.times(),
            rank.traffic,
            rank.arena.peak_bytes,
            passes,
            extrapolation.layers[endpoint.rank],
            rank.trace.last if extrapolation.passes is None else None,
        )

    world = VirtualWorld(plan.world, cluster, slow)
    with _without_collector():
        ranks = tuple(world.run(body))
    return Prediction(plan, ranks, cluster.device.watts, world.calls, extrapolation.drift)
