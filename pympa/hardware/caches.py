"""The caches of a core, as Linux describes them in sysfs, and the largest number of threads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

MOST_THREADS = 1024  # of a kernel; no machine has more cores
SYSFS = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Cache:
    """One cache.

    Attributes:
        level: the level; 1 is nearest to the core.
        kind: "data", "instruction" or "unified".
        size_bytes: the size of the whole cache.
        cpus: the number of cpus that share it.
    """

    level: int
    kind: str
    size_bytes: int
    cpus: int

    def __str__(self) -> str:
        shared = f" shared by {self.cpus} cpus" if self.cpus > 1 else ""
        return f"L{self.level} {self.kind} {self.size_bytes / 1024:,.0f} KiB{shared}"


def read_caches(folder: Path = SYSFS) -> list[Cache]:
    """Return the caches that a folder of sysfs describes; empty if the folder does not exist."""
    found = []
    for entry in sorted(folder.glob("index*")):
        try:
            level, kind, size, cpus = (
                (entry / name).read_text().strip()
                for name in ("level", "type", "size", "shared_cpu_list")
            )
        except OSError:
            continue  # a virtual machine may hide some files
        found.append(Cache(int(level), kind.lower(), _size_bytes(size), _count(cpus)))
    return found


@lru_cache
def cache_of_rank(threads: int, folder: Path = SYSFS) -> int | None:
    """Return the cache bytes of a rank, or None if sysfs does not describe them.

    The bytes are the second level of one core for each thread, and an equal share of the third
    level for each thread, which holds what the second level evicts.
    """
    outer = [cache for cache in read_caches(folder) if cache.level >= 2]
    return sum(threads * cache.size_bytes // cache.cpus for cache in outer) or None


def _size_bytes(text: str) -> int:
    return int(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else int(text)


def _count(cpus: str) -> int:
    """Return the number of cpus in a list like 0-3,8."""
    ranges = (part.partition("-") for part in cpus.split(","))
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)
