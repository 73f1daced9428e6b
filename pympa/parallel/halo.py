"""The halo of a window: the keys on one rank that queries on another rank see.

With a sliding window (Beltagy et al. 2020, arXiv 2004.05150) a query sees only keys that are less
than `window` positions away, so a rank needs few keys of others: a halo, as in stencil codes. Where
they lie follows from the layouts alone. In the zigzag order they are on the ranks that hold the
neighbouring positions, whatever the numbers of these ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pympa.plan.layout import Bounds, Layout, Piece, Range, joined
from pympa.runtime.arena import Array


class Part(NamedTuple):
    """Some keys of a block, in the order of the block.

    Attributes:
        layout: the ranges of these keys.
        first_rows: the block's row of the first key of each range, int64 `[ranges]`; None if these
            are all keys of the block.
        bounds: the intervals of consecutive rows of the block, ascending.
    """

    layout: Layout
    first_rows: NDArray[np.int64] | None
    bounds: tuple[Bounds, ...]

    @property
    def counts(self) -> list[int]:
        """The number of rows of each interval."""
        return [last - first for first, last in self.bounds]

    def cut(self, array: Array) -> list[Array]:
        """Return the rows of an array of the block, interval by interval."""
        return [array[first:last] for first, last in self.bounds]


def whole(layout: Layout) -> Part:
    """Return all keys of a block."""
    return Part(layout, None, ((0, layout.rows),) if layout.rows else ())


@lru_cache(maxsize=1 << 17)  # the pairs of a ring of 256 ranks, the same in every layer
def seen_part(q: Layout, k: Layout, causal: bool, window: int) -> Part:
    """Return the keys of a block that some query sees.

    Args:
        q: the layout of the queries.
        k: the layout of the block.
        causal: whether keys after the query are hidden.
        window: the distance, in positions, from which on keys are hidden.
    """
    seen = {s: _seen_positions(pieces, causal, window) for s, pieces in q.pieces.items()}
    ranges, first_rows = [], []
    for sequence, start, length, row in k.key_ranges.tolist():
        for first, last in seen.get(sequence, ()):
            low, high = max(first, start), min(last, start + length)
            if low < high:
                ranges.append(Range(sequence, low, high - low))
                first_rows.append(row + low - start)
    bounds = joined([(row, row + r.length) for r, row in zip(ranges, first_rows, strict=True)])
    return Part(Layout(tuple(ranges)), np.array(first_rows, np.int64), tuple(bounds))


def _seen_positions(queries: Sequence[Piece], causal: bool, window: int) -> list[Bounds]:
    """Return the positions that queries of one sequence see: ascending intervals, not adjoining."""
    found: list[Bounds] = []
    for start, length in sorted(queries):
        first = start - window + 1
        last = start + length + (0 if causal else window - 1)
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return found
