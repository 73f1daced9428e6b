"""The resources of a rank that computes: kernels of the CPU or of a GPU, and its memory."""

from __future__ import annotations

from pympa.kernels import Kernels
from pympa.kernels.cpu import CpuKernels
from pympa.kernels.cuda import Accelerator, CudaKernels
from pympa.model.resources import RankResources, connect
from pympa.plan.mesh import Plan
from pympa.runtime.arena import Arena
from pympa.runtime.clocks import EventClock
from pympa.runtime.loops import Loops
from pympa.runtime.trace import Trace
from pympa.transport.endpoint import Endpoint


def build_resources(
    endpoint: Endpoint,
    plan: Plan,
    *,
    isa: str,
    threads: int = 1,
    packing_threads: int | None = None,
    accelerator: Accelerator | None = None,
) -> RankResources:
    """Return the resources of the rank of `endpoint`.

    Args:
        endpoint: the endpoint of the rank; its size is the number of ranks of the plan.
        plan: the degrees of the mesh.
        isa: the instruction set that all ranks agreed on; without effect on a GPU.
        threads: the number of threads of each kernel.
        packing_threads: the number of threads that pack weights; None means `threads`.
        accelerator: the GPU of the rank; None means the CPU.

    Raises:
        ValueError: the plan needs another number of ranks.
    """
    kernels: Kernels
    if accelerator is None:
        arena, trace = Arena(), Trace()
        kernels = CpuKernels(
            isa=isa, threads=threads, arena=arena, trace=trace, packing_threads=packing_threads
        )
    else:
        device = accelerator.device
        arena, trace = Arena(device=device), Trace(EventClock(device))
        kernels = CudaKernels(accelerator=accelerator, arena=arena, trace=trace)
    return connect(endpoint, plan, kernels, arena, trace, Loops())
