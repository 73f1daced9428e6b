"""Does a plan fit a device with all keys and values, and what are the most tokens that do?

A rank needs its weights, the keys and values of all its layers over the whole context, as they stay
while tokens are generated, and the rest of what a step uses at its peak. Ranks that share a
memory, as those of a host do, count together.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pympa.footprint.rehearsal import Rehearsal, peak_uses

_MOST = 1 << 30  # tokens or sequences: more is not looked for
_MOST_ROWS = 1 << 15  # of a rank in a step that is run; a row above needs as much as one below
_FEWEST = 8  # numbers, below which there are too few to tell what one more needs
_FASTEST = 16  # times as many are tried at once
_BY_LINES = 8  # numbers that are tried along lines, before halves


class Memory(NamedTuple):
    """The memory of a device.

    Attributes:
        name: the name of the device.
        size_bytes: the bytes that ranks can use.
        ranks: the number of neighbouring ranks that share it.
        each_bytes: the bytes that a rank needs beside its arena, as for libraries.
    """

    name: str
    size_bytes: int
    ranks: int
    each_bytes: int


@dataclass(frozen=True)
class Fit:
    """Whether a plan fits a memory.

    Attributes:
        memory: the memory.
        needed_bytes: the bytes that the ranks of one memory need, of the one that needs most.
        kv_bytes: the part of that for keys and values.
        longest: the most tokens of each sequence that fit, with the batch as it is; 0 if none do.
        most_sequences: the most sequences that fit, with their length as it is; 0 if none do.
    """

    memory: Memory
    needed_bytes: int
    kv_bytes: int
    longest: int
    most_sequences: int

    @property
    def fits(self) -> bool:
        """Whether it fits."""
        return self.needed_bytes <= self.memory.size_bytes


class _Need(NamedTuple):
    total: int
    kv: int


def find_fit(
    memory: Memory,
    rehearsal_of: Callable[[int], Rehearsal],
    world: int,
    lengths: Sequence[int],
) -> Fit:
    """Return whether a plan fits a memory, and how much more would.

    Args:
        memory: the memory.
        rehearsal_of: a function that returns the rehearsal of a rank.
        world: the number of ranks.
        lengths: the number of tokens of each sequence.
    """
    needs = [_need(rehearsal_of(rank), lengths) for rank in range(world)]
    size = memory.size_bytes
    groups = [range(at, min(at + memory.ranks, world)) for at in range(0, world, memory.ranks)]
    fullest = max(groups, key=lambda group: sum(needs[rank].total for rank in group))
    others = len(fullest) * memory.each_bytes
    alike = Counter(needs[rank] for rank in fullest)  # ranks with equal needs are run once
    of_need = {needs[rank]: rank for rank in fullest}
    rehearsals = [(rehearsal_of(of_need[need]), count) for need, count in alike.items()]

    def needed(some: Sequence[int]) -> int:
        kept = sum(count * rehearsal.model.kv_bytes(some) for rehearsal, count in rehearsals)
        if kept > size:  # so a step of this size need not be run
            return kept
        arenas = sum(count * _need(rehearsal, some).total for rehearsal, count in rehearsals)
        return others + arenas

    longest, count = max(lengths), len(lengths)
    by_tokens = _extended(lambda tokens: needed([tokens] * count), _MOST_ROWS * world // count)
    by_count = _extended(lambda some: needed([longest] * some), _MOST_ROWS * world // longest)
    return Fit(
        memory,
        others + sum(needs[rank].total for rank in fullest),
        sum(needs[rank].kv for rank in fullest),
        most_within(size, by_tokens, longest),
        most_within(size, by_count, count),
    )


def _need(rehearsal: Rehearsal, lengths: Sequence[int]) -> _Need:
    """Return what a rank needs for a batch: to load its weights, or to run with all keys."""
    uses, kv_bytes = peak_uses(rehearsal, lengths), rehearsal.model.kv_bytes(lengths)
    running = sum(uses.values()) - uses["keys/values"] + kv_bytes
    most = max(running, rehearsal.loading_bytes)
    return _Need(most + rehearsal.unused_bytes, kv_bytes)


def _extended(need: Callable[[int], int], most: int) -> Callable[[int], int]:
    """Return a need that goes on in proportion above a number, where it would take long to find.

    A step of so many rows works in chunks of the same size, so each row needs as much as others.

    Args:
        need: a function from a number to its need.
        most: the largest number for which it is called.
    """
    if most < _FEWEST:
        return need
    two = functools.cache(lambda: (need(most // 2), need(most)))

    def extended(number: int) -> int:
        if number <= most:
            return need(number)
        near, far = two()
        return far + (far - near) * (number - most) // (most - most // 2)

    return extended


def most_within(limit: int, need: Callable[[int], int], start: int) -> int:
    """Return the largest number whose need is within a limit, to half a percent; 0 if none is.

    The need grows nearly in proportion, so a line through the last two points leads there soon.

    Args:
        limit: the limit.
        need: a function from a number to its need, which grows with it.
        start: the number to begin with.
    """
    low, high, points = 0, _MOST, [(0, 0)]
    number = start
    for tried in itertools.count():
        points.append((number, need(number)))
        if points[-1][1] <= limit:
            low = number
        else:
            high = number
        if high - low <= max(low // 200, 1):
            return low
        number = _next_number(limit, points[-2:], low, high, by_halves=tried > _BY_LINES)
    return low


def _next_number(
    limit: int, points: Sequence[tuple[int, int]], low: int, high: int, *, by_halves: bool
) -> int:
    """Return the next number to try, between one within the limit and one beyond it."""
    (one, need_one), (other, need_other) = points
    slope = (need_other - need_one) / (other - one) if other != one else 0.0
    guess = int(one + (limit - need_one) / slope) if slope > 0 else 2 * low
    if by_halves or not slope:
        guess = (low + high) // 2 if high < _MOST else 2 * low
    if guess <= low + low // 400:  # found from below; the other end of the bracket is missing
        guess = low + max(low // 250, 1)
    most = min(high - 1, _FASTEST * max(low, 1))
    return max(low + 1, min(guess, most))
