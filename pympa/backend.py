"""Put a rank together from a backend's kernels and an endpoint's transports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.arena import DEVICE_ALIGNMENT_BYTES, Arena
from pympa.costs import Costs
from pympa.event_clock import EventClock
from pympa.kernels import Kernels
from pympa.kernels.cpu import CpuKernels
from pympa.kernels.cuda import Accelerator, CudaKernels
from pympa.kernels.virtual import VirtualKernels
from pympa.ledger import Ledger
from pympa.loops import Beat, Loops, OneOfEach, SteadyLoops
from pympa.mesh import Mesh, Plan
from pympa.model import Model
from pympa.partition import Bounds
from pympa.rank import Rank
from pympa.spec import ModelSpec
from pympa.trace import ExpertLoad, Trace
from pympa.transport import Endpoint, NullEndpoint, Reaches, Traffic, axis_transports
from pympa.virtual import VirtualEndpoint


def build_rank(
    endpoint: Endpoint,
    plan: Plan,
    *,
    isa: str,
    threads: int = 1,
    dry: bool = False,
    costs: Costs | None = None,
    accelerator: Accelerator | None = None,
) -> Rank:
    """Return the rank of a plan that `endpoint` stands for.

    Args:
        endpoint: moves messages; its size is the plan's world.
        plan: the mesh.
        isa: instruction set that all ranks agreed on.
        threads: threads of each kernel.
        dry: shapes only; needs no memory, does no work.
        costs: of a device, which takes rows in larger chunks than a CPU, where `dry`.
        accelerator: computes in place of the CPU.

    Raises:
        ValueError: the plan takes another number of ranks.
    """
    if endpoint.size != plan.world:
        raise ValueError(f"plan {plan} takes {plan.world} ranks; got {endpoint.size}")
    mesh, trace, traffic, arena = Mesh(plan, endpoint.rank), Trace(), Traffic(), Arena(dry=dry)
    kernels: Kernels
    if dry:
        if accelerator is not None:
            arena = Arena(dry=True, alignment_bytes=DEVICE_ALIGNMENT_BYTES)
        kernels = VirtualKernels(
            isa=isa, threads=threads, arena=arena, trace=trace, costs=costs, accelerator=accelerator
        )
    elif accelerator is not None:
        device = accelerator.device
        arena, trace = Arena(device=device), Trace(EventClock(device))
        kernels = CudaKernels(accelerator=accelerator, arena=arena, trace=trace)
    else:
        kernels = CpuKernels(isa=isa, threads=threads, arena=arena, trace=trace)
    transports = axis_transports(endpoint, mesh, arena, trace, traffic)
    loops = OneOfEach() if dry else Loops()
    return Rank(mesh, kernels, transports, loops, arena, trace, traffic, ExpertLoad())


def build_virtual_rank(
    endpoint: VirtualEndpoint,
    plan: Plan,
    costs: Costs,
    *,
    isa: str,
    beat: Beat | None = None,
    loads: Sequence[float] | None = None,
    routing: Sequence[NDArray[np.int64]] | None = None,
) -> Rank:
    """Return a rank of shapes on a virtual clock.

    Args:
        endpoint: of a virtual world of the plan's size.
        plan: the mesh.
        costs: what kernels take.
        isa: whose workspaces the arena counts.
        beat: which passes of loops run; None means all.
        loads: rows of each expert, in any unit; None means even ones.
        routing: see `VirtualKernels`.
    """
    mesh, arena, traffic = Mesh(plan, endpoint.rank), Arena(dry=True), Traffic()
    trace = Trace(endpoint.clock)
    kernels: Kernels = VirtualKernels(
        isa=isa,
        threads=1,
        arena=arena,
        trace=trace,
        costs=costs,
        advance=endpoint.advance,
        loads=loads,
        routing=routing,
    )
    transports = axis_transports(endpoint, mesh, arena, trace, traffic)
    loops = (
        Loops()
        if beat is None
        else SteadyLoops(beat, endpoint.rank, trace, traffic, endpoint.worked, endpoint.skip)
    )
    return Rank(mesh, kernels, transports, loops, arena, trace, traffic, ExpertLoad())


class Rehearsal:
    """One rank of a plan on shapes: its arena tells what loading and steps need.

    What depends on the input is taken to be even: each expert gets as many rows as another.

    Args:
        spec: the model.
        plan: the mesh.
        rank: which of its ranks.
        dtype: of weights and activations.
        isa: instruction set, which the order of packed weights depends on.
        threads: of each kernel; each has a workspace.
        stages: layers of each stage; None means `stage_bounds` at its default context.
        reaches: tells which ranks read each other's shared memory; None means none do.
        costs: of a device in place of this CPU.
        accelerator: of this machine, in place of its CPU.

    Attributes:
        arena: dry. ledger: tells what its bytes are for. model: this rank's part.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: Plan,
        rank: int,
        dtype: np.dtype[Any],
        *,
        isa: str,
        threads: int = 1,
        stages: Bounds | None = None,
        reaches: Reaches | None = None,
        costs: Costs | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        endpoint = NullEndpoint(rank, plan.world, reaches)
        rehearsed = build_rank(
            endpoint,
            plan,
            isa=isa,
            threads=threads,
            dry=True,
            costs=costs,
            accelerator=accelerator,
        )
        self.arena, self.ledger = rehearsed.arena, Ledger()
        self.arena.ledger = self.ledger
        self.model = Model(spec, rehearsed, dtype, stages=stages)

    def step(self, lengths: Sequence[int], micro_batches: int | None = None) -> None:
        """Run one step.

        Args:
            lengths: tokens of each sequence.
            micro_batches: parts in time; None means the plan's.
        """
        ids = [np.broadcast_to(np.int32(0), (length,)) for length in lengths]
        with self.arena.scope():
            self.model.forward(self.model.prepare(ids, micro_batches))


def rehearse(
    spec: ModelSpec,
    plan: Plan,
    rank: int,
    lengths: Sequence[int],
    dtype: np.dtype[Any],
    **how: Any,
) -> int:
    """Return the arena bytes that a rank needs for loading and a step; see `Rehearsal`."""
    rehearsal = Rehearsal(spec, plan, rank, dtype, **how)
    rehearsal.step(lengths)
    return rehearsal.arena.peak_bytes
