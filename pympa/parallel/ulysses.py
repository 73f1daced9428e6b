"""Ulysses (`cp`): ranks exchange heads for tokens, attend to whole sequences, and exchange back.

Jacobs et al. 2023 (DeepSpeed Ulysses, arXiv 2309.14509). Groups of heads may differ in size, and
a key/value head that several ranks need is sent to each of them. With groups smaller than `cp`,
blocks of a group's tokens are sent round a ring of groups (two-level, USP: Fang & Zhao 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

from pympa.kernels import Kernels
from pympa.parallel.rows import cut_rows
from pympa.plan.layout import Bounds
from pympa.runtime.arena import Array
from pympa.transport import Transport


def heads_for_tokens(
    kernels: Kernels,
    transport: Transport,
    x: Array,
    heads: Sequence[Bounds],
    out: Array,
    rows: Sequence[int],
) -> None:
    """Exchange all heads of this rank's rows for this rank's heads of all rows. Collective.

    Args:
        kernels: the rank's kernels.
        transport: the group.
        x: all heads of this rank's rows `[rows, heads, dim]`.
        heads: the heads of each rank; key/value heads may overlap.
        out: an output `[all rows, own heads, dim]`, rank after rank.
        rows: the number of rows of each rank.
    """
    parts = [transport.empty((len(x), b - a, x.shape[2]), x.dtype) for a, b in heads]
    for part, (first, last) in zip(parts, heads, strict=True):
        kernels.copy(x[:, first:last], part)
    transport.all_to_all(parts, cut_rows(out, rows))


def tokens_for_heads(
    kernels: Kernels,
    transport: Transport,
    x: Array,
    heads: Sequence[Bounds],
    out: Array,
    rows: Sequence[int],
) -> None:
    """Exchange this rank's heads of all rows for all heads of this rank's rows. Collective.

    Args:
        kernels: the rank's kernels.
        transport: the group.
        x: this rank's heads of all rows `[all rows, own heads, dim]`, rank after rank.
        heads: the heads of each rank, without overlap.
        out: an output `[rows, heads, dim]`.
        rows: the number of rows of each rank.
    """
    parts = [transport.empty((len(out), b - a, x.shape[2]), x.dtype) for a, b in heads]
    transport.all_to_all(cut_rows(x, rows), parts)
    for part, (first, last) in zip(parts, heads, strict=True):
        kernels.copy(part, out[:, first:last])
