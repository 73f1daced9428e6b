"""The tokens of a step on rings of ranks, and the keys that move round them.

A check shares no code with what it checks, so this is a count of its own. Under a window each range
of keys is cut wherever a query begins or ceases to see them, and each piece is seen or is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pympa.plan.layout import Layout, Range, split_batch, split_micro_batches, split_tokens
from pympa.plan.mesh import Plan
from pympa.spec import ModelSpec


class Ring(NamedTuple):
    """The tokens of one micro-batch on the `cp` ranks of one group of sequences.

    Attributes:
        new: the layout of the new tokens, by rank.
        kept: the layout of the new tokens and of earlier ones of their sequences, by rank of the
            ring.
    """

    new: list[Layout]
    kept: list[Layout]


def steps_in_time(plan: Plan, lengths: Sequence[int]) -> Iterator[list[Ring]]:
    """Yield, for each micro-batch, the ring of each group of sequences."""
    groups = split_batch(lengths, plan.dp)
    parts = [split_micro_batches(group, plan.micro_batches) for group in groups]
    kept = [[Layout(())] * plan.degree("ring") for _ in groups]
    for of_groups in zip(*parts, strict=True):
        rings = []
        for number, part in enumerate(of_groups):
            new = split_tokens(part, plan.cp, plan.balance)
            firsts = range(0, plan.cp, plan.head_exchange)
            keys = [Layout(()).then(*new[i : i + plan.head_exchange]) for i in firsts]
            sequences = {r.sequence for r in part.ranges}
            kept[number] = [
                old.since(sequences).then(own) for old, own in zip(kept[number], keys, strict=True)
            ]
            rings.append(Ring(new, kept[number]))
        yield rings


def query_parts(plan: Plan) -> int:
    """Return the number of rings of the same rows whose queries differ."""
    return plan.dim if plan.splits_queries else 1


def moved_keys(
    spec: ModelSpec, plan: Plan, steps: Sequence[Sequence[Ring]], window: int | None
) -> list[int]:
    """Return the rows of keys that rings move in each micro-batch, for one kv head."""
    parts = query_parts(plan)
    if window is None:  # each rank's to all others
        others = plan.degree("ring") - 1
        return [
            parts * others * sum(keys.rows for ring in groups for keys in ring.kept)
            for groups in steps
        ]
    return [
        sum(
            needed_keys(queries, keys, spec.causal, window).rows
            for ring in groups
            for part in range(parts)
            for reader, queries in enumerate(ring_queries(plan, ring, part))
            for owner, keys in enumerate(ring.kept)
            if reader != owner
        )
        for groups in steps
    ]


def ring_queries(plan: Plan, ring: Ring, part: int) -> list[Layout]:
    """Return the queries of each rank of a ring; `part` is its number in `dim`."""
    queries = ring.new
    if plan.splits_queries:
        queries = [split_tokens(layout, plan.dim, plan.balance)[part] for layout in queries]
    firsts = range(0, plan.cp, plan.head_exchange)
    return [Layout(()).then(*queries[i : i + plan.head_exchange]) for i in firsts]


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
