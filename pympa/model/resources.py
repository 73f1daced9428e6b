"""The resources of one rank of a plan, for any backend and any transport."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pympa.kernels import Kernels
from pympa.plan.mesh import Mesh, Plan
from pympa.runtime.arena import Arena
from pympa.runtime.loops import Loops
from pympa.runtime.step import Times
from pympa.runtime.trace import ExpertLoad, Trace
from pympa.runtime.traffic import Traffic
from pympa.transport import Transport, axis_transports
from pympa.transport.endpoint import Endpoint


@dataclass(frozen=True)
class RankResources:
    """Kernels, transports and memory of one rank, and its counters.

    Attributes:
        mesh: the plan and the coordinates of the rank.
        kernels: the kernels, on arrays of the arena.
        transports: the transports to the other ranks, by axis.
        loops: the loops, which choose the passes that run.
        arena: the arena with all memory of the rank.
        trace: the trace of the times.
        traffic: the counters of the bytes of messages.
        load: the counters of the rows sent to experts.
    """

    mesh: Mesh
    kernels: Kernels
    transports: Mapping[str, Transport]
    loops: Loops
    arena: Arena
    trace: Trace
    traffic: Traffic
    load: ExpertLoad


@dataclass(frozen=True)
class RankStep:
    """The record of one rank in one step.

    Attributes:
        times: the parts of the time; see `pympa.runtime.step`.
        traffic: the bytes of messages, and the bytes read in place.
        peak_bytes: the high-water mark of the arena, including loading.
    """

    times: Times
    traffic: Traffic
    peak_bytes: int


def connect(
    endpoint: Endpoint,
    plan: Plan,
    kernels: Kernels,
    arena: Arena,
    trace: Trace,
    loops: Loops,
    traffic: Traffic | None = None,
) -> RankResources:
    """Return the resources of the rank of `endpoint`, with transports by axis.

    Args:
        endpoint: the endpoint of the rank; its size is the number of ranks of the plan.
        plan: the degrees of the mesh.
        kernels: the kernels, on arrays of the arena.
        arena: the arena of the rank.
        trace: the trace of the times.
        loops: the loops, which choose the passes that run.
        traffic: the counters of the bytes of messages; None makes new ones.

    Raises:
        ValueError: the plan needs another number of ranks.
    """
    if endpoint.size != plan.world:
        raise ValueError(f"plan {plan} needs {plan.world} ranks; got {endpoint.size}")
    mesh, traffic = Mesh(plan, endpoint.rank), traffic or Traffic()
    transports = axis_transports(endpoint, mesh, arena, trace, traffic)
    return RankResources(mesh, kernels, transports, loops, arena, trace, traffic, ExpertLoad())
