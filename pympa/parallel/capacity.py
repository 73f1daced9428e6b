"""Capacity: an expert takes so many rows of each group of tokens, the later ones are dropped.

Lepikhin et al. 2020 (GShard). Groups are fixed ranges of a sequence's positions, so which rows are
dropped belongs to the model and not to the plan. Where a group lies on several ranks, in one
micro-batch or in several, these ranks tell each other how many of its rows chose each expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Array
from pympa.kernels import Kernels
from pympa.layout import Layout, Range, edge_groups, shared_groups
from pympa.spec import LayerSpec
from pympa.transport import Transport


class Capacity:
    """How full the experts of one layer are in a step.

    Args:
        layer: how many rows an expert takes.
        turns: layout of each `cp` rank, by micro-batch.
        lengths: tokens of each sequence of the batch.
    """

    def __init__(
        self, layer: LayerSpec, turns: Sequence[Sequence[Layout]], lengths: Sequence[int]
    ) -> None:
        self._layer, self._turns, self._lengths = layer, turns, lengths
        self._group = layer.capacity_group or 1
        # Rows that chose each expert so far, by (sequence, number of the group).
        self._used: dict[tuple[int, int], NDArray[np.int64]] = {}

    def drop_overflow(
        self, kernels: Kernels, transport: Transport, experts: Array, layouts: Sequence[Layout]
    ) -> int:
        """Replace choices past an expert's capacity by -1. Collective.

        Every micro-batch of a step makes this call, in order of time.

        Args:
            kernels: the rank's kernels.
            transport: the ranks that share sequences (`cp`).
            experts: chosen by this rank's rows, int32 `[rows, top_k]`; changed in place.
            layouts: of the rows of each rank in this micro-batch.

        Returns:
            How many of this rank's choices were dropped.
        """
        layer, used = self._layer, self._used
        cuts = [layout.cut(self._group) for layout in layouts]
        mine = cuts[transport.index]
        rows = np.array([r.length for r in mine], np.int64)
        counts = [np.zeros((len(cut), layer.experts), np.int64) for cut in cuts]
        counts[transport.index][:] = kernels.count_experts(experts, rows, layer.experts)
        if self._tells(layouts):
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

    def _tells(self, layouts: Sequence[Layout]) -> bool:
        """Tell whether some rank needs another's counts of this micro-batch, now or later."""
        return not self._shared.isdisjoint(
            key for layout in layouts for key in edge_groups(layout, self._group)
        )

    @cached_property
    def _shared(self) -> frozenset[tuple[int, int]]:
        return shared_groups(self._turns, self._group)

    def _room(self, part: Range) -> int:
        """Return the rows that each expert takes of the group that `part` lies in."""
        first = part.start // self._group * self._group
        return self._layer.capacity(min(self._group, self._lengths[part.sequence] - first))
