"""Does a plan fit: what it needs by rehearsal, what there is by the operating system (Linux)."""

from __future__ import annotations

import platform
import resource
from collections import Counter
from pathlib import Path

from pympa.backend import Rehearsal
from pympa.bench.truth import Job
from pympa.mesh import Plan
from pympa.partition import Bounds
from pympa.session import Session
from pympa.team import Team

PROCESS_BYTES = 150 << 20  # interpreter, libraries and MPI of one rank, beside its arena
DEVICE_BYTES = 1 << 30  # what NCCL, cuBLASLt and the driver take of a GPU, generously
_CGROUP = Path("/sys/fs/cgroup")


def rehearsal(team: Team, job: Job, plan: Plan, stages: Bounds) -> Rehearsal:
    """Return a rehearsal of this rank's part of a job."""
    return Rehearsal(
        job.size.model,
        plan,
        team.rank,
        job.dtype,
        isa=team.isa,
        threads=team.threads,
        stages=stages,
        reaches=team.reaches,
        accelerator=team.accelerator,
    )


class Room:
    """What nodes, or GPUs, have left before anything is loaded. Collective to make.

    Args:
        session: its ranks use it.
    """

    def __init__(self, session: Session) -> None:
        self._place = f"node {platform.node()}"
        self._own, available = PROCESS_BYTES, available_bytes()
        if session.accelerator is not None:
            device = session.accelerator.device
            self._place = f"GPU {device.bus_id} of {self._place}"
            self._own, available = DEVICE_BYTES, device.memory()[0]
        self._present: dict[str, int] = {}
        for place, seen in session.world.gather_objects((self._place, available)):
            self._present[place] = min(seen, self._present.get(place, seen))

    def lacking(self, team: Team, job: Job, plan: Plan, stages: Bounds) -> str | None:
        """Rehearse a plan on shapes and say which place lacks the memory, if any. Collective."""
        rehearsed = rehearsal(team, job, plan, stages)
        rehearsed.step(job.size.lengths)
        needed = self._own + rehearsed.arena.peak_bytes
        everyone = team.world.gather_objects((self._place, needed))
        total: Counter[str] = Counter()
        for place, of_rank in everyone:
            total[place] += of_rank
        for place, of_place in total.items():
            if of_place > self._present[place]:
                return (
                    f"plan {plan} at size {job.size_name} does not fit: {place} needs "
                    f"{of_place:,} bytes ({max(n for _, n in everyone):,} on the largest rank), "
                    f"{self._present[place]:,} are available; use more nodes, another plan or "
                    "another size"
                )
        return None


def available_bytes() -> int:
    """Return the memory that new processes of this node could use, within its cgroup."""
    fields = _fields(Path("/proc/meminfo"))
    available = fields["MemAvailable"]
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def reset_process_peak() -> None:
    """Make `process_peak_bytes` start from what the process holds now, where Linux allows it."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def process_peak_bytes() -> int:
    """Return the largest resident set of this process since the last reset."""
    status = Path("/proc/self/status")
    if status.exists():
        return _fields(status)["VmHWM"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _fields(path: Path) -> dict[str, int]:
    """Read `Name:  123 kB` lines as bytes."""
    parts = (line.split() for line in path.read_text().splitlines())
    return {p[0].rstrip(":"): int(p[1]) * 1024 for p in parts if len(p) == 3 and p[2] == "kB"}
