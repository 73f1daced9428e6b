"""Collect a run's outputs on rank 0, in the order of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.model.model import Logits, Model, Prepared
from pympa.plan.layout import Layout, sequence_starts
from pympa.runtime.arena import Array
from pympa.spec import ModelSpec
from pympa.transport import Transport

LOGITS = "logits"

ROUTING = "routing"  # the last part of the names of chosen experts

Outputs = dict[str, NDArray[Any]]
"""The outputs by name, `[tokens, d_model]`, one sequence after the other. "logits" is
`[sequences, vocabulary]`, and "layers.0.routing" int32 `[tokens, top_k]`, before any drops."""


def collect(
    model: Model, prepared: Prepared, world: Transport, only: int | None = None
) -> Outputs | None:
    """Run one step and collect every branch on rank 0; other ranks return None. Collective.

    Args:
        model: this rank's part of the model.
        prepared: the batch.
        world: the transport over all ranks.
        only: the index of the one sequence to keep; None keeps all.

    Raises:
        ValueError: a row arrived twice (on rank 0).
    """
    lengths = [n if only in (None, s) else 0 for s, n in enumerate(prepared.batch.lengths)]
    seen: list[tuple[str, Array, Layout]] = []

    def probe(name: str, array: Array, layout: Layout) -> None:
        if model.mesh.coordinate("columns") == 0 or name.endswith(ROUTING):
            for first, last, kept in _rows_of(layout, only):
                seen.append((name, model.read(array[first:last]), kept))

    logits = model.forward(prepared, probe)
    parts = world.gather_objects((seen, [_copied(model, part) for part in logits]), root=0)
    if world.index != 0:
        return None
    return assemble(
        model.spec,
        lengths,
        [s for part, _ in parts for s in part],
        [g for _, p in parts for g in p],
    )


def assemble(
    spec: ModelSpec,
    lengths: Sequence[int],
    branches: Sequence[tuple[str, Array, Layout]],
    logits: Sequence[Logits],
) -> Outputs:
    """Put all ranks' rows at their global positions; missing rows are NaN, or -1.

    Raises:
        ValueError: a row arrived twice.
    """
    names = [f"layers.{i}.{b}" for i in range(len(spec.blocks)) for b in ("attention", "mlp")]
    floats = [array.dtype for name, array, _ in branches if not name.endswith(ROUTING)]
    dtype = floats[0] if floats else np.dtype(np.float32)
    outputs: Outputs = {
        name: np.full((sum(lengths), spec.d_model), np.nan, dtype) for name in [*names, "output"]
    }
    for index, layer in enumerate(spec.blocks):
        if layer.experts:
            experts = np.full((sum(lengths), layer.top_k), -1, np.int32)
            outputs[f"layers.{index}.{ROUTING}"] = experts
    starts = sequence_starts(lengths)
    filled = {name: np.zeros(sum(lengths), bool) for name in outputs}
    for name, array, layout in branches:
        rows = layout.rows_from(starts)
        if filled[name][rows].any():
            raise ValueError(f"{name}: expected each row once; got {layout.ranges[0]} twice")
        filled[name][rows] = True
        outputs[name][rows] = array
    table = np.full((len(lengths), spec.vocabulary), np.nan, np.float32)
    for part in logits:
        first, last = part.vocabulary
        table[[r.sequence for r in part.layout.ranges], first:last] = part.values
    outputs[LOGITS] = table[[i for i, length in enumerate(lengths) if length]]
    return outputs


def _copied(model: Model, part: Logits) -> Logits:
    return replace(part, values=model.read(part.values))


def _rows_of(layout: Layout, only: int | None) -> list[tuple[int, int, Layout]]:
    """Return (start, stop, layout) of the rows that belong to a sequence, or of all."""
    if only is None:
        return [(0, layout.rows, layout)]
    found, at = [], 0
    for r in layout.ranges:
        if r.sequence == only:
            found.append((at, at + r.length, Layout((r,))))
        at += r.length
    return found
