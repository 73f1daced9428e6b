"""The resources of a rank on a virtual clock."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pympa.costs.device_costs import Costs
from pympa.kernels.virtual import VirtualKernels
from pympa.model.resources import RankResources, connect
from pympa.plan.mesh import Plan
from pympa.runtime.arena import Arena
from pympa.runtime.loops import Loops
from pympa.runtime.trace import Trace
from pympa.runtime.traffic import Traffic
from pympa.sim.loops import ExtrapolatedLoops, Extrapolation
from pympa.sim.world import VirtualEndpoint


def virtual_resources(
    endpoint: VirtualEndpoint,
    plan: Plan,
    costs: Costs,
    *,
    isa: str,
    extrapolation: Extrapolation | None = None,
    loads: Sequence[float] | None = None,
    routing: Sequence[NDArray[np.int64]] | None = None,
) -> RankResources:
    """Return the resources of a rank that computes on shapes and on a virtual clock.

    Args:
        endpoint: the endpoint of a virtual world with as many ranks as the plan.
        plan: the degrees of the mesh.
        costs: the seconds that kernels take.
        isa: the instruction set whose workspaces the arena counts.
        extrapolation: the number of passes of a loop to run; None means all.
        loads: the rows of each expert, in any unit; None means even loads.
        routing: the chosen experts, see `VirtualKernels`.
    """
    arena, trace = Arena(dry=True), Trace(endpoint.clock)
    kernels = VirtualKernels(
        isa=isa,
        threads=1,
        arena=arena,
        trace=trace,
        costs=costs,
        advance=endpoint.advance,
        loads=loads,
        routing=routing,
    )
    loops, traffic = Loops(), Traffic()
    if extrapolation is not None:
        loops = ExtrapolatedLoops(extrapolation, endpoint, trace, traffic)
    return connect(endpoint, plan, kernels, arena, trace, loops, traffic)
