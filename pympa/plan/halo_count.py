"""The keys that a rank needs of another one, as `comm_volume` counts them.

A check shares no code with what it checks, so this is a count of its own: each range of keys is cut
wherever a query begins or ceases to see them, and each piece is seen by a query or by none.
"""

from __future__ import annotations

import numpy as np

from pympa.plan.layout import Layout, Range


def needed_keys(q: Layout, k: Layout, causal: bool, window: int | None) -> Layout:
    """Return the keys that a rank needs of another one: all, or with a window those that it sees.

    Args:
        q: the queries of the rank.
        k: the keys of the other one.
        causal: whether keys after the query are hidden.
        window: the distance, in positions, from which on keys are hidden; None for no window.
    """
    if window is None:
        return k
    found: list[Range] = []
    for sequence, start, length in k.ranges:
        if sequence not in q.pieces:
            continue
        starts, lengths = np.array(q.pieces[sequence]).T
        after = 0 if causal else window - 1
        # Of each piece of q, the first position that it sees and the one after the last.
        first, last = np.clip(
            [starts - window + 1, starts + lengths + after], start, start + length
        )
        edges = np.unique([first, last])
        seen = ((first[:, None] <= edges[:-1]) & (edges[1:] <= last[:, None])).any(axis=0)
        pieces = zip(edges[:-1][seen].tolist(), np.diff(edges)[seen].tolist(), strict=True)
        found += Layout(()).then(Layout(tuple(Range(sequence, *piece) for piece in pieces))).ranges
    return Layout(tuple(found))
