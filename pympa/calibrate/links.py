"""Messages between two ranks: latency, bandwidth, and a rank's own time for each message."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pympa.calibrate.interpreter import around_messages
from pympa.costs.cluster import Link
from pympa.model.resources import RankResources
from pympa.plan.mesh import Plan
from pympa.session.team import Team

_SIZES = (1, 4096, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
_COUNTS, _SMALL_BYTES = (2, 9), 1024
_ROUNDS = 21
_SETS = 2


class LinkFit(NamedTuple):
    """A link, and its fit: number of message sizes, median and largest relative error."""

    link: Link
    sizes: int
    error: float
    worst: float


def measure_link(team: Team, dtype: str, shares_memory: bool) -> LinkFit:
    """Exchange messages between ranks 0 and 1, 2 and 3, and so on, all at once. Collective.

    The seconds of a message are fitted as latency + bytes / bandwidth, by least squares of relative
    errors.

    Args:
        team: the ranks, all of one node.
        dtype: the dtype of the small model that measures Python around messages.
        shares_memory: whether the ranks read each other's memory.
    """
    resources = team.resources(Plan(tp=team.size))
    seconds = [_exchange(team, resources, size, 1) for size in _SIZES]
    some, many = (_exchange(team, resources, _SMALL_BYTES, count) for count in _COUNTS)
    each = max(0.0, (many - some) / (2 * (_COUNTS[1] - _COUNTS[0])))
    resources.arena.close()
    latency, by_byte = _fit(_SIZES, seconds)
    posting = 2 * (team.size - 1) * each
    small, large = (
        _mean(team, around_messages(team, dtype, large=large)) - posting for large in (False, True)
    )
    fitted = [latency + size * by_byte for size in _SIZES]
    errors = [abs(t - s) / s for t, s in zip(fitted, seconds, strict=True)]
    link = Link(
        name="MPI between ranks of one node",
        ranks=team.size,
        latency_seconds=float(f"{max(0.0, latency):.4g}"),
        bytes_per_second=float(f"{1 / by_byte:.4g}"),
        start_seconds=float(f"{max(0.0, small):.4g}"),
        large_start_seconds=float(f"{max(0.0, large):.4g}"),
        message_seconds=float(f"{each:.4g}"),
        shares_memory=shares_memory,
    )
    return LinkFit(link, len(_SIZES), statistics.median(errors), max(errors))


def _fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    weights = 1 / np.asarray(seconds)
    terms = np.stack([np.ones(len(sizes)), np.asarray(sizes, float)], axis=1)
    (latency, by_byte), *_ = np.linalg.lstsq(terms * weights[:, None], np.ones(len(sizes)))
    return float(latency), float(by_byte)


def _exchange(team: Team, resources: RankResources, size: int, count: int) -> float:
    """Return the median seconds that pairs of ranks wait while they send `count` messages."""
    transport, partner = resources.transports["tp"], team.rank ^ 1
    sets = [[np.ones(size, np.uint8) for _ in range(2 * count)] for _ in range(_SETS)]
    found = []
    for repetition in range(_ROUNDS):
        arrays = sets[repetition % _SETS]
        team.barrier()
        if partner >= team.size:
            continue
        with resources.trace.step():
            sends = [(array, partner) for array in arrays[:count]]
            receives = [(array, partner) for array in arrays[count:]]
            transport.wait(transport.start(sends, receives))
        times = resources.trace.last.times()
        found.append(times.step if count > 1 else times.waits["tp"])
    return _mean(team, statistics.median(found) if found else None)


def _mean(team: Team, mine: float | None) -> float:
    """Return the mean over the ranks that measured something. Collective."""
    everyone = team.world.gather_objects(mine)
    return float(np.mean([seconds for seconds in everyone if seconds is not None]))
