"""The ranks' clocks against rank 0's (Cristian 1989, "Probabilistic clock synchronization")."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pympa.transport import Transport

_ROUNDS = 10


class Offset(NamedTuple):
    """What to add to a rank's clock to get rank 0's, seconds, and by how much that may be wrong."""

    seconds: float
    error_seconds: float


def clock_offsets(world: Transport, clock: Callable[[], float]) -> list[Offset]:
    """Compare all ranks' clocks with rank 0's. Collective.

    Rank 0 asks each rank for its time. The answer was given between question and reply, so taking
    the middle is wrong by at most half the round trip; the shortest of some round trips counts.

    Args:
        world: all ranks.
        clock: this rank's, seconds.

    Returns:
        The offset of each rank's clock on rank 0, nothing on the others.
    """
    question, answer = np.zeros(1), np.zeros(1)
    offsets = [Offset(0.0, 0.0)]
    for peer in range(1, world.size):
        best = Offset(0.0, math.inf)
        for _ in range(_ROUNDS):
            if world.index == 0:
                asked = clock()
                world.wait(world.start([(question, peer)], [(answer, peer)]))
                heard = clock()
                found = Offset((asked + heard) / 2 - float(answer[0]), (heard - asked) / 2)
                best = min(best, found, key=lambda offset: offset.error_seconds)
            elif world.index == peer:
                world.wait(world.start([], [(question, 0)]))
                answer[0] = clock()
                world.wait(world.start([(answer, 0)], []))
        offsets.append(best)
    return offsets if world.index == 0 else []
