"""Free memory of nodes, control groups and GPUs, and whether what ranks need together fits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from pympa.hardware.memory import memory_limits
from pympa.session.team import Team


class Need(NamedTuple):
    """The bytes that a rank needs at one time.

    Attributes:
        host: the bytes on the host.
        device: the bytes on its GPU.
        check: the part of `host` that verification needs.
    """

    host: int
    device: int = 0
    check: int = 0


class Shortage(NamedTuple):
    """A memory that is too small.

    Attributes:
        pool: the name of the memory.
        needed: the bytes that its ranks need together.
        available: the bytes that there are.
        needs: the needs of its ranks.
    """

    pool: str
    needed: int
    available: int
    needs: Sequence[Need]

    def __str__(self) -> str:
        most = max((need.host for need in self.needs), default=0)
        return (
            f"{self.pool} needs {self.needed:,} bytes ({most:,} on the largest rank), "
            f"{self.available:,} are available"
        )


class Room:
    """Free memory before anything is loaded. Collective to make.

    Args:
        team: the ranks that use the memory.

    Attributes:
        ranks: the number of ranks that use each memory, by its name.
        present: the bytes that are free in each memory.
    """

    def __init__(self, team: Team) -> None:
        limits, devices = memory_limits(), {}
        if team.accelerator is not None:
            device = team.accelerator.device
            devices[f"GPU {device.bus_id} of {next(iter(limits))}"] = device.memory()[0]
        self._host, self._device = [*limits], [*devices]
        everyone = team.world.gather_objects((limits, limits | devices))
        self.ranks = Counter(pool for of_rank, _ in everyone for pool in of_rank)
        self.present: dict[str, int] = {}
        for _, of_rank in everyone:
            for pool, seen in of_rank.items():
                self.present[pool] = min(seen, self.present.get(pool, seen))

    def shortage(self, team: Team, needs: Sequence[Need], idle_bytes: int = 0) -> Shortage | None:
        """Return the first memory that is too small for some ranks together. Collective.

        Args:
            team: these ranks.
            needs: the needs of this rank at one time after the other, as many on all ranks.
            idle_bytes: the bytes that each other rank needs meanwhile.
        """
        everyone = team.world.gather_objects((self._host, self._device, needs))
        for moment in range(len(needs)):
            total: defaultdict[str, list[Need]] = defaultdict(list)
            for hosts, devices, of_rank in everyone:
                for pool in hosts:
                    total[pool].append(of_rank[moment])
                for pool in devices:
                    total[pool].append(Need(of_rank[moment].device))
            for pool, of_pool in total.items():
                idle = max(self.ranks[pool] - len(of_pool), 0)
                needed = sum(need.host for need in of_pool) + idle * idle_bytes
                if needed > self.present[pool]:
                    return Shortage(pool, needed, self.present[pool], of_pool)
        return None
