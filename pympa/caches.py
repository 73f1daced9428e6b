"""The caches of a core, as Linux tells them in sysfs, and how many cores there may be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

MOST_THREADS = 1024  # of a kernel: more than the cores of any machine
SYSFS = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Cache:
    """One cache.

    Attributes:
        level: 1 is nearest to the core. kind: "data", "instruction" or "unified".
        size_bytes: of the whole cache. cpus: how many share it.
    """

    level: int
    kind: str
    size_bytes: int
    cpus: int

    def __str__(self) -> str:
        shared = f" shared by {self.cpus} cpus" if self.cpus > 1 else ""
        return f"L{self.level} {self.kind} {self.size_bytes / 1024:,.0f} KiB{shared}"


def read_caches(folder: Path = SYSFS) -> list[Cache]:
    """Return the caches that a folder of sysfs describes; none where there is no such folder."""
    found = []
    for entry in sorted(folder.glob("index*")):
        try:
            level, kind, size, cpus = (
                (entry / name).read_text().strip()
                for name in ("level", "type", "size", "shared_cpu_list")
            )
        except OSError:
            continue  # a virtual machine may hide some of them
        found.append(Cache(int(level), kind.lower(), _size_bytes(size), _count(cpus)))
    return found


@lru_cache
def cache_of_rank(threads: int, folder: Path = SYSFS) -> int | None:
    """Return the bytes of cache that a rank may call its own, or None where sysfs does not tell.

    That is the second level of a core for each thread, and as many even shares of the third level,
    which keeps what the second drops.
    """
    outer = [cache for cache in read_caches(folder) if cache.level >= 2]
    return sum(threads * cache.size_bytes // cache.cpus for cache in outer) or None


def _size_bytes(text: str) -> int:
    return int(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else int(text)


def _count(cpus: str) -> int:
    """Return how many cpus a list like 0-3,8 names."""
    ranges = (part.partition("-") for part in cpus.split(","))
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)
