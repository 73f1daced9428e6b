"""Ulysses (`cp`): ranks exchange heads for tokens, attend to whole sequences, and exchange back.

Jacobs et al. 2023 (DeepSpeed Ulysses, arXiv 2309.14509). Groups of heads may differ in size, and
a key/value head that several ranks need goes to each of them. With groups smaller than the ring,
blocks of a group's tokens go round a ring of groups (two-level, USP: Fang & Zhao 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

from pympa.arena import Array
from pympa.kernels import Kernels
from pympa.layout import Span
from pympa.transport import Transport


def heads_for_tokens(
    kernels: Kernels,
    transport: Transport,
    x: Array,
    heads: Sequence[Span],
    out: Array,
    rows: Sequence[int],
) -> None:
    """Turn all heads of this rank's rows into this rank's heads of all rows. Collective.

    Args:
        kernels: the rank's kernels.
        transport: the group.
        x: `[rows, heads, dim]`.
        heads: that each rank gets; key/value heads may overlap.
        out: `[all rows, own heads, dim]`, rank after rank.
        rows: of each rank.
    """
    parts = [transport.empty((len(x), b - a, x.shape[2]), x.dtype) for a, b in heads]
    for part, (first, last) in zip(parts, heads, strict=True):
        kernels.copy(x[:, first:last], part)
    transport.all_to_all(parts, _by_rank(out, rows))


def tokens_for_heads(
    kernels: Kernels,
    transport: Transport,
    x: Array,
    heads: Sequence[Span],
    out: Array,
    rows: Sequence[int],
) -> None:
    """Turn this rank's heads of all rows into all heads of this rank's rows. Collective.

    Args:
        kernels: the rank's kernels.
        transport: the group.
        x: `[all rows, own heads, dim]`, rank after rank.
        heads: of each rank, without overlap.
        out: `[rows, heads, dim]`.
        rows: of each rank.
    """
    parts = [transport.empty((len(out), b - a, x.shape[2]), x.dtype) for a, b in heads]
    transport.all_to_all(_by_rank(x, rows), parts)
    for part, (first, last) in zip(parts, heads, strict=True):
        kernels.copy(part, out[:, first:last])


def _by_rank(x: Array, rows: Sequence[int]) -> list[Array]:
    parts, at = [], 0
    for count in rows:
        parts.append(x[at : at + count])
        at += count
    return parts
