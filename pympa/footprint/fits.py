"""Does a plan fit a device with all keys and values, and what are the most tokens that do?

A rank needs its weights, the keys and values of all its layers over the whole context, as they stay
while tokens are generated, and the rest of what a step uses at its peak. Ranks that share a
memory, as those of a host do, count together.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple, TypeVar

from pympa.footprint.kinds import first_alike, rows_of_ranks
from pympa.footprint.rehearsal import Rehearsal, run_step
from pympa.plan.mesh import Mesh, Plan

T = TypeVar("T")

_MOST = 1 << 30  # tokens or sequences: more is not looked for
_MOST_ROWS = 1 << 15  # of a rank in a step that is run; a row above needs as much as one below
_MOST_SCORED_ROWS = 1 << 11  # the same where each tile of scores is a step of its own
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
    """The bytes of a rank.

    Attributes:
        beside: the most bytes of a step, without keys and values.
        kv: the keys and values of all layers.
        loading: the most bytes while weights are loaded.
    """

    beside: int
    kv: int
    loading: int

    @property
    def total(self) -> int:
        return max(self.beside + self.kv, self.loading)


def find_fit(
    memory: Memory,
    rehearsal_of: Callable[[int], Rehearsal],
    plan: Plan,
    lengths: Sequence[int],
) -> Fit:
    """Return whether a plan fits a memory, and how much more would.

    Args:
        memory: the memory.
        rehearsal_of: a function that returns the rehearsal of a rank.
        plan: the plan.
        lengths: the number of tokens of each sequence.
    """
    memories = _Memories(memory, rehearsal_of, plan, lengths)
    rows = _MOST_SCORED_ROWS if plan.dim_algo == "reduce" else _MOST_ROWS
    rows *= plan.dp * plan.cp
    longest, count, size = max(lengths), len(lengths), memory.size_bytes
    longer = _Growth(lambda tokens: [tokens] * count, rows // count, 2 * plan.cp)
    more = _Growth(lambda some: [longest] * some, rows // longest, plan.dp)
    return Fit(
        memory,
        memories.asked_bytes,
        memories.asked_kv_bytes,
        most_within(size, partial(memories.needed, longer), longest),
        most_within(size, partial(memories.needed, more), count),
    )


class _Growth:
    """Batches of growing size, and what ranks need for them.

    A large step works in chunks of one size, so each row needs as much as others. Above some number
    the need beside keys and values goes on in proportion, where it would take long to find.

    Args:
        lengths: a function from a number to the lengths of sequences.
        most: the largest number for which a step is run.
        step: the number of parts into which numbers are dealt out; the fullest part counts.

    Attributes:
        lengths: a function from a number to the lengths of sequences.
    """

    def __init__(self, lengths: Callable[[int], list[int]], most: int, step: int) -> None:
        self.lengths, self._step = lengths, step
        self._near = most // 2 // step * step
        self._lines: dict[Rehearsal, tuple[int, int]] = {}

    def beside(self, rehearsal: Rehearsal, number: int) -> int:
        """Return the most bytes that a step of a rank uses beside keys and values."""
        near, far = self._near, 2 * self._near
        if near < _FEWEST * self._step or number <= far:
            return run_step(rehearsal, self.lengths(number)).peak_beside_kept
        if rehearsal not in self._lines:
            steps = (run_step(rehearsal, self.lengths(n)).peak_beside_kept for n in (near, far))
            self._lines[rehearsal] = next(steps), next(steps)
        need_near, need_far = self._lines[rehearsal]
        beyond = -(-number // self._step) * self._step - far
        return need_far - (need_near - need_far) * beyond // near


class _Memories:
    """The ranks of all memories.

    Ranks that need as much for the batch as asked, and have as many rows of a larger one, are taken
    to need as much for that: only the first of them is run.

    Args:
        memory: one memory.
        rehearsal_of: a function that returns the rehearsal of a rank.
        plan: the plan.
        lengths: the batch as asked.

    Attributes:
        asked_bytes: what the ranks of a memory need for that batch, of the one that needs most.
        asked_kv_bytes: the part of that for keys and values.
    """

    def __init__(
        self,
        memory: Memory,
        rehearsal_of: Callable[[int], Rehearsal],
        plan: Plan,
        lengths: Sequence[int],
    ) -> None:
        self._memory, self._plan, self._lengths = memory, plan, [*lengths]
        self._rehearsal_of = cache(rehearsal_of)
        self._needs: list[_Need] = []
        for rank, first in enumerate(first_alike(rehearsal_of(0), lengths)):
            same = first < rank
            need = self._needs[first] if same else _asked_need(rehearsal_of(rank), lengths)
            self._needs.append(need)
        meshes = [Mesh(plan, rank) for rank in range(plan.world)]
        self._places = [(mesh.coordinate("dp"), mesh.coordinate("cp")) for mesh in meshes]
        fullest = max(self._by_memory(self._needs), key=self._total)
        self.asked_bytes = self._total(fullest)
        self.asked_kv_bytes = sum(need.kv for need in fullest)

    def needed(self, growth: _Growth, number: int) -> int:
        """Return the bytes that the fullest memory needs, or some number above its size."""
        lengths = growth.lengths(number)
        if lengths == self._lengths:
            return self.asked_bytes
        rows = rows_of_ranks(self._plan, lengths)
        kinds = [(need, rows[g][r]) for need, (g, r) in zip(self._needs, self._places, strict=True)]
        first = {kind: rank for rank, kind in reversed([*enumerate(kinds)])}
        memories = {frozenset(Counter(kind).items()) for kind in self._by_memory(kinds)}
        rehearsals = {kind: self._rehearsal_of(rank) for kind, rank in first.items()}
        kv = {kind: found.model.kv_bytes(lengths) for kind, found in rehearsals.items()}
        most_kv = max(sum(kv[kind] * count for kind, count in of) for of in memories)
        if most_kv > self._memory.size_bytes:  # so a step of this size need not be run
            return most_kv
        needs = {
            kind: _Need(growth.beside(found, number), kv[kind], found.loading_bytes)
            for kind, found in rehearsals.items()
        }
        return max(self._total([needs[k] for k, n in of for _ in range(n)]) for of in memories)

    def _by_memory(self, of_ranks: Sequence[T]) -> list[Sequence[T]]:
        size = self._memory.ranks
        return [of_ranks[at : at + size] for at in range(0, len(of_ranks), size)]

    def _total(self, needs: Sequence[_Need]) -> int:
        return sum(need.total + self._memory.each_bytes for need in needs)


def _asked_need(rehearsal: Rehearsal, lengths: Sequence[int]) -> _Need:
    beside = run_step(rehearsal, lengths).peak_beside_kept
    return _Need(beside, rehearsal.model.kv_bytes(lengths), rehearsal.loading_bytes)


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
