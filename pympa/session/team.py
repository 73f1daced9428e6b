"""Ranks that work together: all ranks of a session, or the first of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from pympa.errors import RefusedError
from pympa.hardware.cores import Placement, Processors, count_processors, even_threads
from pympa.model.resources import RankResources
from pympa.plan.mesh import Plan
from pympa.session.agreement import check_all, check_same
from pympa.session.resources import build_resources
from pympa.transport import Transport, world_transport

if TYPE_CHECKING:
    from pympa.kernels.cuda import Accelerator
    from pympa.transport.device import DeviceEndpoint
    from pympa.transport.mpi import MpiEndpoint

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Team:
    """Ranks that work together.

    Attributes:
        endpoint: the endpoint of this rank.
        placements: the node and cores of each rank.
        threads: the number of threads of each kernel.
        isa: the instruction set of the kernels, or "cuda".
        mpi_library: the name and version of the MPI library.
        accelerator: the GPU of this rank; None means the CPU.
        gpus: the node and GPU of each rank; None on CPUs.
        route: the route of arrays between GPUs, in words; None on CPUs.
        isa_note: why hosts use another instruction set than their best one; None if they do not.
    """

    endpoint: MpiEndpoint | DeviceEndpoint
    placements: Sequence[Placement]
    threads: int
    isa: str
    mpi_library: str
    accelerator: Accelerator | None = None
    gpus: Sequence[Placement] | None = None
    route: str | None = None
    isa_note: str | None = None

    @property
    def rank(self) -> int:
        """The number of this rank in the team."""
        return self.endpoint.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.endpoint.size

    @cached_property
    def world(self) -> Transport:
        """The transport between all ranks of the team."""
        return world_transport(self.endpoint)

    @property
    def backend(self) -> Literal["cpu", "cuda"]:
        """The kind of kernels."""
        return "cpu" if self.accelerator is None else "cuda"

    @cached_property
    def cores(self) -> int:
        """The number of cores that the ranks may use."""
        return count_processors(self.placements, self.threads).total

    @property
    def processors(self) -> int:
        """The number of cores, or of GPUs with backend cuda."""
        return self._processors.total

    @property
    def oversubscribed(self) -> bool:
        """Whether a node has more threads of ranks than cores, or more ranks than GPUs."""
        return self._processors.oversubscribed

    @cached_property
    def _processors(self) -> Processors:
        return count_processors(self.gpus or self.placements, self.threads)

    def on_first(self, ranks: int, work: Callable[[Team], T]) -> T:
        """Run `work` on the first ranks and return rank 0's result on all. Collective.

        The other ranks wait without a deadline; an error on any rank ends the job.

        Args:
            ranks: the number of ranks that work; `work` gets a team of them.
            work: a function of that team. A RefusedError that it raises is raised on all ranks.
        """
        if ranks == self.size:
            return work(self)
        result: T | None = None
        refusal: str | None = None
        if self.rank < ranks:
            try:
                result = work(self._first(ranks))
            except RefusedError as error:
                refusal = str(error)
        self.endpoint.idle_barrier()
        result, refusal = self.world.gather_objects((result, refusal))[0]
        if refusal is not None:
            raise RefusedError(refusal)
        return result

    def _first(self, ranks: int) -> Team:
        placements = self.placements[:ranks]
        crowded = count_processors(placements, self.threads).oversubscribed
        return replace(
            self,
            endpoint=self.endpoint.first(ranks, sleeps=crowded),
            placements=placements,
            gpus=None if self.gpus is None else self.gpus[:ranks],
        )

    def agree(self, what: str, value: Any) -> None:
        """Refuse unless all ranks have the same value. Collective.

        Raises:
            RefusedError: a rank differs; the message names the first one that differs from rank 0.
        """
        check_same(what, self.world.gather_objects(value))

    def check(self, local: Callable[[], T]) -> T:
        """Run a check on every rank; continue only if none fails; see `check_all`. Collective."""
        return check_all(self.world, local)

    def barrier(self) -> None:
        """Return when all ranks have called this. Collective."""
        arrived = np.zeros(self.size, np.uint8)
        self.world.all_gather([arrived[i : i + 1] for i in range(self.size)])

    def idle_barrier(self) -> None:
        """Return when all ranks have called this; there is no deadline. Collective."""
        self.endpoint.idle_barrier()

    def reaches(self, ranks: Sequence[int]) -> bool:
        """Return whether these ranks read each other's shared memory."""
        return self.endpoint.reaches(ranks)

    def resources(self, plan: Plan) -> RankResources:
        """Return this rank's resources for a plan: mesh, arena, kernels, transports.

        Raises:
            RefusedError: the plan needs another number of ranks.
        """
        if plan.world != self.size:
            raise RefusedError(
                f"plan {plan} needs {plan.world} ranks; this session has {self.size}"
            )
        return build_resources(
            self.endpoint,
            plan,
            isa=self.isa,
            threads=self.threads,
            packing_threads=max(self.threads, even_threads(self.placements)),
            accelerator=self.accelerator,
        )
