"""Consecutive rows of an array, one part for each rank or each expert."""

from __future__ import annotations

from collections.abc import Iterable

from pympa.runtime.arena import Array


def cut_rows(array: Array, counts: Iterable[int]) -> list[Array]:
    """Return consecutive parts of an array: the first counts[0] rows, the next counts[1], ..."""
    parts, start = [], 0
    for count in counts:
        parts.append(array[start : start + count])
        start += count
    return parts
