"""Capacity: an expert takes so many rows of each group of tokens, the later ones are dropped.

Lepikhin et al. 2020 (GShard). Groups are fixed ranges of a sequence's positions, so which rows are
dropped belongs to the model and not to the plan. Where a group lies on several ranks, or in several
micro-batches, the ranks tell each other how many rows chose each expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Array
from pympa.kernels import Kernels
from pympa.layout import Layout, Range, groups_span
from pympa.spec import LayerSpec
from pympa.transport import Transport

Used = dict[tuple[int, int], NDArray[np.int64]]
"""Rows that chose each expert so far in a step, by (sequence, number of the group)."""


def drop_overflow(
    kernels: Kernels,
    transport: Transport,
    layer: LayerSpec,
    experts: Array,
    layouts: Sequence[Layout],
    lengths: Sequence[int],
    used: Used,
) -> int:
    """Replace choices past an expert's capacity by -1. Collective.

    Args:
        kernels: the rank's kernels.
        transport: the ranks that share sequences (`cp`).
        layer: how many rows an expert takes.
        experts: chosen by this rank's rows, int32 `[rows, top_k]`; changed in place.
        layouts: of the rows of each rank.
        lengths: tokens of each sequence of the batch.
        used: by earlier micro-batches of the step; gets what this one uses.

    Returns:
        How many of this rank's choices were dropped.
    """
    group = layer.capacity_group or 1
    cuts = [layout.cut(group) for layout in layouts]
    mine = cuts[transport.index]
    rows = np.array([r.length for r in mine], np.int64)
    counts = [np.zeros((len(cut), layer.experts), np.int64) for cut in cuts]
    counts[transport.index][:] = kernels.count_experts(experts, rows, layer.experts)
    if groups_span(layouts, group):
        transport.all_gather(counts)
    chosen = dict(zip(itertools.chain(*cuts), itertools.chain(*counts), strict=True))
    taken: dict[Range, NDArray[np.int64]] = {}
    for r in sorted(chosen):
        key = (r.sequence, r.start // group)
        taken[r] = used.get(key, np.zeros(layer.experts, np.int64))
        used[key] = taken[r] + chosen[r]
    before = np.array([taken[r] for r in mine], np.int64).reshape(-1, layer.experts)
    after = before.copy()
    capacity = [
        layer.capacity(min(group, lengths[r.sequence] - r.start // group * group)) for r in mine
    ]
    kernels.drop_overflow(experts, rows, after, np.array(capacity, np.int64))
    return int(counts[transport.index].sum() - (after - before).sum())
