"""How much a kernel that works row by row reads and writes, told from its arrays' shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pympa.arena import Array

Extent = tuple[int, float]
"""Rows that a kernel works on, and bytes of one that it reads and writes."""


def extent(kernel: str, arrays: dict[str, Any]) -> Extent:
    """Return the extent of a call.

    Args:
        kernel: its name in `pympa._core`, or "copy".
        arrays: its arguments; what is no array does not count.
    """
    special = _SPECIAL.get(kernel)
    if special is not None:
        return special(**arrays)
    return _all({name: array for name, array in arrays.items() if name != "workspace"})


def nbytes(*values: Any) -> int:
    """Return the bytes of those values that are arrays."""
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))


def _all(arrays: dict[str, Any]) -> Extent:
    """Return the extent of a kernel that reads or writes each of its arrays once."""
    last: Array = arrays["out"] if "out" in arrays else next(iter(arrays.values()))
    rows = math.prod(last.shape[:-1])
    return rows, nbytes(*arrays.values()) / max(rows, 1)


_SPECIAL: dict[str, Callable[..., Extent]] = {
    "start_state": lambda out, **_: _all({"out": out}),
    "finish": lambda o, out, **_: _all({"o": o, "out": out}),
    "merge": lambda out, other_out, **_: _all({"out": out, "again": out, "other": other_out}),
    "norm": lambda x, out, **_: _all({"x": x, "out": out}),
    "rope": lambda x, **_: _all({"x": x, "again": x}),
    # Of the source, which may be a whole vocabulary, only rows that are wanted.
    "gather_rows": lambda out, **_: _all({"source": out, "out": out}),
    "combine_rows": lambda weights, base, out, **_: (
        len(out),
        (weights.shape[1] + (1 if base is None else 2)) * out.shape[1] * out.itemsize,
    ),
    "sum_partials": lambda parts, out, **_: _all({"parts": parts, "out": out}),
    "select_experts": lambda logits, **_: _all({"out": logits}),
    "sort_rows": lambda experts, counts, **_: (experts.size, float(len(counts))),
}
