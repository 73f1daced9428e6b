"""Put a rank together from a backend's kernels and an endpoint's transports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pympa.arena import Arena
from pympa.kernels import Kernels
from pympa.kernels.cpu import CpuKernels
from pympa.kernels.virtual import VirtualKernels
from pympa.mesh import Mesh, Plan
from pympa.model import Model
from pympa.partition import Bounds
from pympa.rank import Rank
from pympa.spec import ModelSpec
from pympa.trace import ExpertLoad, Trace
from pympa.transport import Endpoint, NullEndpoint, Reaches, Traffic, axis_transports


def build_rank(
    endpoint: Endpoint, plan: Plan, *, isa: str, threads: int = 1, dry: bool = False
) -> Rank:
    """Return the rank of a plan that `endpoint` stands for.

    Args:
        endpoint: moves messages; its size is the plan's world.
        plan: the mesh.
        isa: instruction set that all ranks agreed on.
        threads: threads of each kernel.
        dry: shapes only; needs no memory, does no work.

    Raises:
        ValueError: the plan takes another number of ranks.
    """
    if endpoint.size != plan.world:
        raise ValueError(f"plan {plan} takes {plan.world} ranks; got {endpoint.size}")
    mesh, arena, trace, traffic = Mesh(plan, endpoint.rank), Arena(dry=dry), Trace(), Traffic()
    kind = VirtualKernels if dry else CpuKernels
    kernels: Kernels = kind(isa=isa, threads=threads, arena=arena, trace=trace)
    transports = axis_transports(endpoint, mesh, arena, trace, traffic)
    return Rank(mesh, kernels, transports, arena, trace, traffic, ExpertLoad())


def rehearse(
    spec: ModelSpec,
    plan: Plan,
    rank: int,
    lengths: Sequence[int],
    dtype: np.dtype[Any],
    *,
    isa: str,
    threads: int = 1,
    stages: Bounds | None = None,
    reaches: Reaches | None = None,
) -> int:
    """Return the arena bytes that rank `rank` of a plan will need, by running it on shapes.

    What depends on the input is taken to be even: each expert gets as many rows as another.
    """
    endpoint = NullEndpoint(rank, plan.world, reaches)
    rehearsed = build_rank(endpoint, plan, isa=isa, threads=threads, dry=True)
    model = Model(spec, rehearsed, dtype, stages=stages)
    ids = [np.broadcast_to(np.int32(0), (length,)) for length in lengths]
    model.forward(model.prepare(ids))
    return rehearsed.arena.peak_bytes
