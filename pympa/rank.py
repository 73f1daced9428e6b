"""Everything one rank needs to run one plan, whatever moves its messages."""

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
from pympa.spec import ModelSpec
from pympa.trace import Trace
from pympa.transport import Endpoint, NullEndpoint, Traffic, axis_transports
from pympa.weights import PhiloxSource


class Rank:
    """One rank's memory, clock, kernels and transports.

    Args:
        endpoint: moves messages; its size is the plan's world.
        plan: the mesh.
        isa: instruction set that all ranks agreed on.
        threads: threads of each kernel.
        dry: shapes only; needs no memory, does no work.

    Attributes:
        mesh: the rank's place. arena, trace, traffic: what it used, spent and sent.
        kernels: the backend. transports: by axis.
    """

    def __init__(
        self, endpoint: Endpoint, plan: Plan, *, isa: str, threads: int = 1, dry: bool = False
    ) -> None:
        if endpoint.size != plan.world:
            raise ValueError(f"plan {plan} takes {plan.world} ranks; got {endpoint.size}")
        self.mesh = Mesh(plan, endpoint.rank)
        self.arena = Arena(dry=dry)
        self.trace = Trace()
        self.traffic = Traffic()
        kind = VirtualKernels if dry else CpuKernels
        self.kernels: Kernels = kind(isa=isa, threads=threads, arena=self.arena, trace=self.trace)
        self.transports = axis_transports(endpoint, self.mesh, self.arena, self.trace, self.traffic)

    def model(
        self, spec: ModelSpec, dtype: np.dtype[Any], source: PhiloxSource | None = None
    ) -> Model:
        """Return this rank's part of a model, with its weights made."""
        return Model(
            spec,
            self.mesh,
            self.kernels,
            self.transports,
            self.arena,
            dtype,
            source or PhiloxSource(),
            rehearsal=self.arena.dry,
        )


def rehearse(
    spec: ModelSpec,
    plan: Plan,
    rank: int,
    lengths: Sequence[int],
    dtype: np.dtype[Any],
    *,
    isa: str,
    threads: int = 1,
) -> int:
    """Return the arena bytes that rank `rank` of a plan will need, by running it on shapes."""
    rehearsed = Rank(NullEndpoint(rank, plan.world), plan, isa=isa, threads=threads, dry=True)
    model = rehearsed.model(spec, dtype)
    ids = [np.broadcast_to(np.int32(0), (length,)) for length in lengths]
    model.forward(model.prepare(ids))
    return rehearsed.arena.peak_bytes
