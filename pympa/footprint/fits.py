"""Does a plan fit a device with all keys and values, and what are the most tokens that do?

A rank needs its weights, the keys and values of all its layers over the whole context, as they stay
while tokens are generated, and the rest of what a step uses at its peak. Ranks that share a
memory, as those of a host do, count together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pympa.footprint.rehearsal import Rehearsal, peak_uses

_MOST = 1 << 30  # tokens or sequences: more is not looked for
_CLOSE = 1.005  # the search stops when what fits and what does not are so close


class Memory(NamedTuple):
    """The memory of a device.

    Attributes:
        name: the name of the device.
        size_bytes: the bytes that ranks can use.
        ranks: the number of neighbouring ranks that share it.
    """

    name: str
    size_bytes: int
    ranks: int


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
    groups = [range(at, min(at + memory.ranks, world)) for at in range(0, world, memory.ranks)]
    fullest = max(groups, key=lambda group: sum(needs[rank].total for rank in group))
    alike = Counter(needs[rank] for rank in fullest)  # ranks with equal needs are run once
    of_need = {needs[rank]: rank for rank in fullest}
    rehearsals = [(rehearsal_of(of_need[need]), count) for need, count in alike.items()]

    def fits(some: Sequence[int]) -> bool:
        total = sum(count * _need(rehearsal, some).total for rehearsal, count in rehearsals)
        return total <= memory.size_bytes

    longest = max(lengths)
    return Fit(
        memory,
        sum(needs[rank].total for rank in fullest),
        sum(needs[rank].kv for rank in fullest),
        _most(lambda tokens: fits([tokens] * len(lengths)), longest),
        _most(lambda count: fits([longest] * count), len(lengths)),
    )


def _need(rehearsal: Rehearsal, lengths: Sequence[int]) -> _Need:
    """Return what a rank needs for a batch: to load its weights, or to run with all keys."""
    uses, kv_bytes = peak_uses(rehearsal, lengths), rehearsal.model.kv_bytes(lengths)
    running = sum(uses.values()) - uses["keys/values"] + kv_bytes
    return _Need(max(running, rehearsal.loading_bytes), kv_bytes)


def _most(fits: Callable[[int], bool], start: int) -> int:
    """Return the largest number that fits, to half a percent; 0 if 1 does not.

    Args:
        fits: a function that returns whether a number fits; smaller ones than one that does fit.
        start: the number to begin with.
    """
    low, high = 0, start
    while high < _MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1 and (low == 0 or high / low > _CLOSE):
        middle = (low + high) // 2 if low else max(high // 2, 1)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
