"""Memory as the operating system sees it (Linux)."""

from __future__ import annotations

import resource
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


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
