"""Capacity: an expert accepts a limited number of rows of each group; later rows are dropped.

Lepikhin et al. 2020 (GShard). Groups are fixed ranges of a sequence's positions, so the dropped
rows depend on the model and not on the plan. If a group is split over several ranks, in one
micro-batch or in several, these ranks exchange the number of its rows that chose each expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pympa.kernels import Kernels
from pympa.plan.layout import Layout, Range
from pympa.runtime.arena import Array
from pympa.spec import LayerSpec
from pympa.transport import Transport

Group = tuple[int, int]
"""A group of consecutive positions: (sequence, index of the group in it)."""


class Capacity:
    """The used capacity of the experts of one layer in a step.

    Args:
        layer: the layer with the capacity of an expert.
        micro_batches: the layout of each `cp` rank, by micro-batch.
        lengths: the number of tokens of each sequence of the batch.
    """

    def __init__(
        self, layer: LayerSpec, micro_batches: Sequence[Sequence[Layout]], lengths: Sequence[int]
    ) -> None:
        self._layer, self._lengths = layer, lengths
        self._micro_batches = micro_batches
        self._group = layer.capacity_group or 1
        # Rows that chose each expert so far, by (sequence, index of the group).
        self._used: dict[tuple[int, int], NDArray[np.int64]] = {}

    def drop_overflow(
        self, kernels: Kernels, transport: Transport, experts: Array, layouts: Sequence[Layout]
    ) -> int:
        """Replace choices that exceed an expert's capacity by -1. Collective.

        Every micro-batch of a step calls this, in order of time.

        Args:
            kernels: the rank's kernels.
            transport: the ranks that share sequences (`cp`).
            experts: the experts that this rank's rows chose, int32 `[rows, top_k]`; changed in
                place.
            layouts: the layout of the rows of each rank in this micro-batch.

        Returns:
            The number of this rank's choices that were dropped.
        """
        layer, used = self._layer, self._used
        cuts = [layout.cut(self._group) for layout in layouts]
        mine = cuts[transport.index]
        rows = np.array([r.length for r in mine], np.int64)
        counts = [np.zeros((len(cut), layer.experts), np.int64) for cut in cuts]
        counts[transport.index][:] = kernels.count_experts(experts, rows, layer.experts)
        if self._needs_counts(layouts):
            transport.all_gather(counts)
        chosen = dict(zip(itertools.chain(*cuts), itertools.chain(*counts), strict=True))
        taken: dict[Range, NDArray[np.int64]] = {}
        for r in sorted(chosen):
            key = (r.sequence, r.start // self._group)
            taken[r] = used.get(key, np.zeros(layer.experts, np.int64))
            used[key] = taken[r] + chosen[r]
        before = np.array([taken[r] for r in mine], np.int64).reshape(-1, layer.experts)
        after = before.copy()
        capacity = np.array([self._room(r) for r in mine], np.int64)
        kernels.drop_overflow(experts, rows, after, capacity)
        return int(counts[transport.index].sum() - (after - before).sum())

    def _needs_counts(self, layouts: Sequence[Layout]) -> bool:
        """Return whether some rank needs another's counts of this micro-batch, now or later."""
        return not self._shared.isdisjoint(
            key for layout in layouts for key in edge_groups(layout, self._group)
        )

    @cached_property
    def _shared(self) -> frozenset[tuple[int, int]]:
        return shared_groups(self._micro_batches, self._group)

    def _room(self, part: Range) -> int:
        """Return the capacity of each expert for the group that contains `part`."""
        first = part.start // self._group * self._group
        return self._layer.capacity(min(self._group, self._lengths[part.sequence] - first))


def edge_groups(layout: Layout, length: int) -> Iterator[Group]:
    """Yield the groups of `length` positions in which a range of the layout begins or ends.

    Other groups are inside one range.
    """
    for sequence, start, count in layout.ranges:
        yield sequence, start // length
        yield sequence, (start + count - 1) // length


def shared_groups(micro_batches: Sequence[Sequence[Layout]], length: int) -> frozenset[Group]:
    """Return the groups of `length` positions that are split over more than one rank.

    Args:
        micro_batches: the layout of each rank, by micro-batch; the ranks of a group may be in
            different micro-batches.
        length: the number of positions of a group.
    """
    holders: dict[Group, set[int]] = {}
    for layouts in micro_batches:
        for rank, layout in enumerate(layouts):
            for group in edge_groups(layout, length):
                holders.setdefault(group, set()).add(rank)
    return frozenset(group for group, ranks in holders.items() if len(ranks) > 1)
