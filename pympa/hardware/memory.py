"""The memory of nodes, control groups and processes, from the operating system (Linux)."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

PROCESS_BYTES = 150 << 20  # interpreter, libraries and MPI of one rank, in addition to its arena
LIBRARY_BYTES = 60 << 20  # the same of a program that only loads a model; measured, not a bound
DEVICE_BYTES = 1 << 30  # an upper estimate of what NCCL, cuBLASLt and the driver use of a GPU


def memory_limits(root: Path = Path("/")) -> dict[str, int]:
    """Return the bytes that this process can still allocate, by the name of each limit.

    The limits are the node and each control group of the process with a limit, in version 1 or 2
    of the interface. Cached files that are not in use count as free.

    Args:
        root: the root of the file system.
    """
    node = f"node {platform.node()}"
    found = {node: _fields(root / "proc/meminfo")["MemAvailable"]}
    for folder in _control_groups(root):
        left = _left(folder)
        if left is not None:
            found[f"control group {folder.relative_to(root)} of {node}"] = left
    return found


def available_bytes() -> int:
    """Return the memory that new processes of this node could use, within its control groups."""
    return min(memory_limits().values())


def _control_groups(root: Path) -> list[Path]:
    """Return the folders of the memory groups that this process is in, inner ones first."""
    own, mount = root / "proc/self/cgroup", root / "sys/fs/cgroup"
    lines = own.read_text().splitlines() if own.exists() else []
    found: list[Path] = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        tops = []
        if "memory" in controllers.split(","):
            tops = [mount / "memory"]
        elif number == "0":
            tops = [mount, mount / "unified"]
        for top in tops:
            inner = top / path.lstrip("/")
            if not inner.is_dir():
                inner = top  # a container that sees only its own group, under another path
            while inner != top:
                found.append(inner)
                inner = inner.parent
            found.append(top)
    return found


def _left(group: Path) -> int | None:
    """Return the free bytes below a group's limit; None if it has no limit."""
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:
            continue  # the other version, or a group without memory limits
        if most != "max" and int(most) < _NO_LIMIT:
            return max(int(most) - used + int(stat.get(cached, 0)), 0)
    return None


_NO_LIMIT = 1 << 60  # the older interface writes a number of pages near 2^63 bytes


def reset_process_peak() -> None:
    """Restart `process_peak_bytes` from the current size, where Linux allows it."""
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
