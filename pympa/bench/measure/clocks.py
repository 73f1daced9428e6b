"""Offsets of ranks' clocks from rank 0's (Cristian 1989, "Probabilistic clock synchronization")."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pympa.transport import Transport

_ROUNDS = 10


class Offset(NamedTuple):
    """Seconds to add to a rank's clock to get rank 0's, and the largest possible error of that."""

    seconds: float
    error_seconds: float


def clock_offsets(world: Transport, clock: Callable[[], float]) -> list[Offset]:
    """Compare all ranks' clocks with rank 0's. Collective.

    Rank 0 asks each rank for its time. The rank read its clock between question and reply, so the
    middle of the two is wrong by at most half the round trip. The shortest round trip is used.

    Args:
        world: the transport over all ranks.
        clock: a function that returns this rank's time in seconds.

    Returns:
        The offset of each rank's clock on rank 0, and an empty list on the other ranks.
    """
    question, answer = np.zeros(1), np.zeros(1)
    offsets = [Offset(0.0, 0.0)]
    for peer in range(1, world.size):
        best = Offset(0.0, math.inf)
        for _ in range(_ROUNDS):
            if world.index == 0:
                asked = clock()
                world.wait(world.start([(question, peer)], [(answer, peer)]))
                answered = clock()
                found = Offset((asked + answered) / 2 - float(answer[0]), (answered - asked) / 2)
                best = min(best, found, key=lambda offset: offset.error_seconds)
            elif world.index == peer:
                world.wait(world.start([], [(question, 0)]))
                answer[0] = clock()
                world.wait(world.start([(answer, 0)], []))
        offsets.append(best)
    return offsets if world.index == 0 else []
