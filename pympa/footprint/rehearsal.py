"""A rehearsal runs one rank of a plan on shapes; its arena then shows the memory that it needs.

The routing depends on the input, so it is assumed to be even: each expert gets as many rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np

from pympa.kernels.cuda import Accelerator
from pympa.kernels.virtual import VirtualKernels
from pympa.model.model import Model
from pympa.model.resources import RankResources, connect
from pympa.plan.mesh import Plan
from pympa.plan.partition import Stages
from pympa.runtime.arena import DEVICE_ALIGNMENT_BYTES, Arena
from pympa.runtime.ledger import USES, Ledger
from pympa.runtime.loops import Loops
from pympa.runtime.trace import Trace
from pympa.spec import ModelSpec
from pympa.transport.endpoint import Endpoint, NullEndpoint, Reaches

if TYPE_CHECKING:
    from pympa.costs.device_costs import Costs

T = TypeVar("T")


class FirstPasses(Loops):
    """Loops that run only their first pass, because the other passes need the same memory.

    All layers have their own weights; of equal ones in a row only the first runs.
    """

    def __init__(self) -> None:
        self._kinds: set[int] = set()

    def chunks(self, chunks: Sequence[T], kind: Hashable = None) -> Iterable[T]:
        """Return the first chunk."""
        return chunks[:1]

    def layers(self, layers: Sequence[T]) -> Iterable[T]:
        """Return the first layer."""
        return layers[:1]

    def restart(self) -> None:
        """Forget the micro-batches of the last step."""
        self._kinds.clear()

    @contextmanager
    def micro_batch(self, kind: int) -> Iterator[bool]:
        """Run the first micro-batch of each kind."""
        first = kind not in self._kinds
        self._kinds.add(kind)
        yield first


def dry_resources(
    endpoint: Endpoint,
    plan: Plan,
    *,
    isa: str,
    threads: int = 1,
    costs: Costs | None = None,
    accelerator: Accelerator | None = None,
) -> RankResources:
    """Return the resources of a rank that computes on shapes, without memory and without work.

    Args:
        endpoint: the endpoint of the rank; its messages are not sent.
        plan: the degrees of the mesh.
        isa: the instruction set whose workspaces are counted.
        threads: the number of threads of each kernel; each thread has a workspace.
        costs: the costs of a simulated device, which set the size of chunks; None means this CPU.
        accelerator: the GPU whose workspaces are counted; None means the CPU.
    """
    alignment = None if accelerator is None else DEVICE_ALIGNMENT_BYTES
    arena, trace = Arena(dry=True, alignment_bytes=alignment), Trace()
    kernels = VirtualKernels(
        isa=isa, threads=threads, arena=arena, trace=trace, costs=costs, accelerator=accelerator
    )
    return connect(endpoint, plan, kernels, arena, trace, FirstPasses())


class Rehearsal:
    """One rank of a plan on shapes.

    Args:
        spec: the model.
        plan: the degrees of the mesh.
        rank: the number of the rank.
        dtype: the dtype of weights and activations.
        isa: the instruction set, which determines the order of packed weights.
        threads: the number of threads of each kernel; each thread has a workspace.
        stages: the layers of each stage; None means `stage_bounds` at its default context.
        reaches: a function that returns whether ranks share memory; None means that none do.
        costs: the costs of a simulated device, instead of this CPU.
        accelerator: the GPU of this machine, instead of its CPU.

    Attributes:
        arena: the arena, which has no memory.
        ledger: the ledger of the arena's bytes by use.
        kernels: the kernels on shapes.
        model: this rank's part of the model.
        loading_bytes: the most bytes that are in use while weights are loaded.
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
        stages: Stages | None = None,
        reaches: Reaches | None = None,
        costs: Costs | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        endpoint = NullEndpoint(rank, plan.world, reaches)
        resources = dry_resources(
            endpoint, plan, isa=isa, threads=threads, costs=costs, accelerator=accelerator
        )
        self.arena, self.ledger = resources.arena, Ledger()
        self.arena.ledger = self.ledger
        self.kernels = resources.kernels
        shapes = msgspec.structs.replace(spec, context=None)  # it runs sequences of any length
        self.model = Model(shapes, resources, dtype, stages=stages)
        self.loading_bytes = self.arena.peak_bytes

    def step(
        self,
        lengths: Sequence[int],
        micro_batches: int | None = None,
        *,
        all_logits: bool = False,
    ) -> None:
        """Run one step.

        Args:
            lengths: the number of tokens of each sequence.
            micro_batches: the number of micro-batches; None means the plan's.
            all_logits: whether logits of all tokens are computed.
        """
        ids = [np.broadcast_to(np.int32(0), (length,)) for length in lengths]
        with self.arena.scope():
            self.model.forward(self.model.prepare(ids, micro_batches, all_logits=all_logits))


def run_step(rehearsal: Rehearsal, lengths: Sequence[int]) -> Ledger:
    """Run a step and return the ledger of its bytes, without those of loading.

    Args:
        rehearsal: the rehearsal of a rank.
        lengths: the number of tokens of each sequence.
    """
    ledger = rehearsal.ledger
    ledger.restart_peak(rehearsal.arena.used_bytes)
    rehearsal.step(lengths)
    return ledger


def peak_uses(rehearsal: Rehearsal, lengths: Sequence[int]) -> dict[str, int]:
    """Return the bytes by use at the peak of a step, without those of loading.

    Args:
        rehearsal: the rehearsal of a rank; it is run.
        lengths: the number of tokens of each sequence.
    """
    ledger = run_step(rehearsal, lengths)
    found: dict[str, int] = dict.fromkeys(USES, 0)
    for (_, use), size in ledger.peak.items():
        found[use] += size
    return found


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
