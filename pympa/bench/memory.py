"""Does a plan fit: what it needs by rehearsal, what there is by the operating system (Linux)."""

from __future__ import annotations

import platform
import resource
from collections import Counter
from pathlib import Path

import msgspec

from pympa.backend import rehearse
from pympa.bench.experiment import PlannedRun
from pympa.bench.truth import Job
from pympa.mesh import Plan
from pympa.session import Session

MOST_MICRO_BATCHES = 128
PROCESS_BYTES = 150 << 20  # interpreter, libraries and MPI of one rank, beside its arena
_CGROUP = Path("/sys/fs/cgroup")


def fitting_plans(
    session: Session, job: Job, planned: PlannedRun, plan: Plan
) -> tuple[list[Plan], str]:
    """Return the plan's variants to measure that fit into memory. Collective.

    A family with stages leaves the number of micro-batches open: powers of two are variants.

    Returns:
        The variants, and why the last one that does not fit does not.
    """
    variants, complaint = [plan], ""
    if planned.family is not None and plan.pp > 1:
        parts = sum(job.size.lengths) if job.size.model.causal else job.size.batch
        most = min(MOST_MICRO_BATCHES, parts)
        counts = [2**i for i in range(most.bit_length())]
        variants = [msgspec.structs.replace(plan, micro_batches=count) for count in counts]
    fitting: list[Plan] = []
    for variant in variants:
        lacking = _lacking_memory(session, job, variant)
        if lacking is None:
            fitting.append(variant)
        else:
            complaint = lacking
    return fitting, complaint


def _lacking_memory(session: Session, job: Job, plan: Plan) -> str | None:
    """Rehearse the plan on shapes and say which node lacks the memory, if any. Collective."""
    needed = PROCESS_BYTES + rehearse(
        job.size.model,
        plan,
        session.rank,
        job.size.lengths,
        job.dtype,
        isa=session.isa,
        threads=session.threads,
        reaches=session.reaches,
    )
    everyone = session.world.gather_objects((platform.node(), needed, available_bytes()))
    total: Counter[str] = Counter()
    present: dict[str, int] = {}
    for node, peak, available in everyone:
        total[node] += peak
        present[node] = min(available, present.get(node, available))
    for node in total:
        if total[node] > present[node]:
            return (
                f"plan {plan} at size {job.size_name} does not fit: node {node} needs "
                f"{total[node]:,} bytes ({max(p for _, p, _ in everyone):,} on the largest rank), "
                f"{present[node]:,} are available; use more nodes, another plan or another size"
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
