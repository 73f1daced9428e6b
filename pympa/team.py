"""Ranks that work on one thing together: all of a session, or the first few while others rest."""

from __future__ import annotations

import os
import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from pympa.arena import Arena
from pympa.backend import build_rank
from pympa.errors import RefusedError
from pympa.mesh import Plan
from pympa.rank import Rank
from pympa.trace import Trace
from pympa.transport import WORLD, Traffic, Transport

if TYPE_CHECKING:
    from pympa.kernels.cuda import Accelerator
    from pympa.transport.device import DeviceEndpoint
    from pympa.transport.mpi import MpiEndpoint

T = TypeVar("T")
Place = tuple[str, set[int] | set[str]]
"""Where a rank computes: its node, and the cores of it that it may use, or the device it has."""


class Team:
    """See the module. Whoever makes one calls `gather` before anything else.

    Args:
        threads: of each kernel.

    Attributes:
        rank, size: among the team.
        cores: that the team may use. processors: the same, or its devices. oversubscribed: some
            node has more threads than that, or ranks.
        isa: instruction set of the kernels. mpi_library: its name and version.
        accelerator: this rank's, in place of the CPU. route: how its arrays travel.
    """

    isa: str
    mpi_library: str
    accelerator: Accelerator | None = None
    route: str | None = None

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.rank = 0

    @property
    def backend(self) -> Literal["cpu", "cuda"]:
        """What computes."""
        return "cpu" if self.accelerator is None else "cuda"

    def gather(
        self,
        endpoint: MpiEndpoint | DeviceEndpoint,
        places: Sequence[Place],
        devices: Sequence[Place] | None = None,
    ) -> None:
        """Take up an endpoint and what is known of its ranks.

        Args:
            endpoint: of the team's ranks.
            places: of each of them, in cores.
            devices: places of each of them in devices, where these compute.
        """
        self._endpoint, self._places, self._devices = endpoint, places, devices
        self.rank, self.size = endpoint.rank, endpoint.size
        self.cores, _ = count_processors(places, self.threads)
        self.processors, self.oversubscribed = count_processors(devices or places, self.threads)
        self._world = Transport(endpoint, WORLD, range(self.size), Arena(), Trace(), Traffic())

    @property
    def world(self) -> Transport:
        """Transport between all of the team."""
        return self._world

    def on_first(self, ranks: int, work: Callable[[Team], T]) -> T:
        """Run `work` on the first ranks and return rank 0's result on all. Collective.

        The others rest meanwhile, however long that takes: an error on any rank ends the job.

        Args:
            ranks: how many work; they are the team that `work` gets.
            work: may raise RefusedError, which is then raised on all ranks.
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
        self._endpoint.rest()
        result, refusal = self.world.gather_objects((result, refusal))[0]
        if refusal is not None:
            raise RefusedError(refusal)
        return result

    def _first(self, ranks: int) -> Team:
        team, places = Team(self.threads), self._places[:ranks]
        _, crowded = count_processors(places, self.threads)
        team.isa, team.mpi_library = self.isa, self.mpi_library
        team.accelerator, team.route = self.accelerator, self.route
        devices = None if self._devices is None else self._devices[:ranks]
        team.gather(self._endpoint.first(ranks, naps=crowded), places, devices)
        return team

    def agree(self, what: str, value: Any) -> None:
        """Refuse unless all ranks gave the same value. Collective.

        Raises:
            RefusedError: names the ranks that differ from rank 0.
        """
        check_same(what, self.world.gather_objects(value))

    def check(self, local: Callable[[], T]) -> T:
        """Run a check on every rank and go on only if none objects. Collective.

        Args:
            local: raises ValueError or OSError to object.

        Raises:
            RefusedError: on all ranks, with the first objection.
        """
        result: T | None = None
        objection = None
        try:
            result = local()
        except (ValueError, OSError) as error:
            objection = str(error)
        objections = self.world.gather_objects(objection)
        for text in objections:
            if text is not None:
                raise RefusedError(text)
        return result  # type: ignore[return-value]

    def barrier(self) -> None:
        """Return when all ranks are here. Collective."""
        arrived = np.zeros(self.size, np.uint8)
        self.world.all_gather([arrived[i : i + 1] for i in range(self.size)])

    def rest(self) -> None:
        """Return when all ranks are here, however long some are at work. Collective."""
        self._endpoint.rest()

    def reaches(self, ranks: Sequence[int]) -> bool:
        """Tell whether these ranks read each other's shared memory."""
        return self._endpoint.reaches(ranks)

    def on(self, plan: Plan, *, dry: bool = False) -> Rank:
        """Return this rank's resources for a plan: mesh, arena, kernels, transports.

        Raises:
            RefusedError: the plan takes another number of ranks.
        """
        if plan.world != self.size:
            raise RefusedError(
                f"plan {plan} takes {plan.world} ranks; this session has {self.size}"
            )
        return build_rank(
            self._endpoint,
            plan,
            isa=self.isa,
            threads=self.threads,
            dry=dry,
            accelerator=self.accelerator,
        )


def check_same(what: str, values: Sequence[Any]) -> None:
    """Refuse unless the values of all ranks are the same; see `Team.agree`."""
    others = [rank for rank, other in enumerate(values) if other != values[0]]
    if others:
        raise RefusedError(
            f"{what}: expected the same on all ranks; rank 0 has {values[0]!r}, "
            f"rank {others[0]} has {values[others[0]]!r}"
        )


def own_place() -> Place:
    """Return where this rank is."""
    return platform.node(), os.sched_getaffinity(0)


def count_processors(places: Sequence[Place], threads: int) -> tuple[int, bool]:
    """Return the cores, or devices, of all ranks, and whether some node has more threads than them.

    Ranks that are pinned count the cores that they are pinned to.
    """
    found: defaultdict[str, set[int | str]] = defaultdict(set)
    ranks: Counter[str] = Counter()
    for node, of_rank in places:
        found[node] |= of_rank
        ranks[node] += 1
    crowded = any(ranks[node] * threads > len(found[node]) for node in found)
    return sum(map(len, found.values())), crowded


def even_threads(places: Sequence[Place]) -> int:
    """Return the threads that give ranks all their cores and no core to two of them, at least 1.

    The same for all ranks: what those with the fewest cores can take.
    """
    ranks = Counter(node for node, _ in places)
    cores = {node: count_processors([p for p in places if p[0] == node], 1)[0] for node in ranks}
    share = min(cores[node] // ranks[node] for node in ranks)
    return max(1, min(share, *(len(affinity) for _, affinity in places)))
