"""The cores and GPUs of the ranks, and whether there are enough of them."""

from __future__ import annotations

import os
import platform
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Placement(NamedTuple):
    """The node and processors of a rank.

    Attributes:
        node: the name of its node.
        processors: the numbers of the cores that it may use there, or the bus address of its GPU.
    """

    node: str
    processors: frozenset[int] | frozenset[str]


class Processors(NamedTuple):
    """The processors of some ranks together.

    Attributes:
        total: the number of cores, or GPUs, of all of them.
        oversubscribed: whether a node has more threads of ranks than cores or GPUs.
    """

    total: int
    oversubscribed: bool


def own_placement() -> Placement:
    """Return the node and the cores of this process."""
    return Placement(platform.node(), frozenset(os.sched_getaffinity(0)))


def count_processors(placements: Sequence[Placement], threads: int) -> Processors:
    """Count the processors of some ranks; of a pinned rank, only the cores that it is pinned to.

    Args:
        placements: the node and processors of each rank.
        threads: the number of threads of each rank.
    """
    found: defaultdict[str, set[int | str]] = defaultdict(set)
    ranks: Counter[str] = Counter()
    for node, processors in placements:
        found[node] |= processors
        ranks[node] += 1
    crowded = any(ranks[node] * threads > len(found[node]) for node in found)
    return Processors(sum(map(len, found.values())), crowded)


def even_threads(placements: Sequence[Placement]) -> int:
    """Return the largest number of threads that gives no core to two ranks, at least 1.

    It is the same for all ranks, so the ranks with the fewest cores decide it.
    """
    nodes: defaultdict[str, list[Placement]] = defaultdict(list)
    for placement in placements:
        nodes[placement.node].append(placement)
    share = min(count_processors(of, 1).total // len(of) for of in nodes.values())
    return max(1, min(share, *(len(processors) for _, processors in placements)))


def processor_name() -> str:
    """Return the name of the processor from Linux, or of its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
