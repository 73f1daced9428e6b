"""Numbers of few bits, widened to float32: fp8 with scales, and MXFP4.

fp8 weights have a scale for each tensor, each row (compressed-tensors), or each block of 128 x 128
(DeepSeek-V3, arXiv 2412.19437, section 3.3); a value is the stored number times its scale. MXFP4
(OCP Microscaling Formats 1.0) has groups of 32 values along the last axis: four bits each, and a
power of two for the group. Only the rows and columns that are asked for are widened.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.checkpoint.tensors import Spans, check_spans, select, selected_shape

MXFP4_GROUP = 32
"""The number of MXFP4 values that share a scale; they take 16 bytes."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of FP4 E2M1, by the three lower bits
_EXPONENT_BIAS, _NAN_EXPONENT = 127, 255


def widen_scaled(
    values: NDArray[Any], scales: NDArray[Any], blocks: Sequence[int], *spans: Spans
) -> NDArray[np.float32]:
    """Widen numbers that share a scale in each block.

    Args:
        values: the stored numbers, `[..., outputs, inputs]` of an fp8 or another small dtype.
        scales: the scales, one for each block, of as many axes as `values`.
        blocks: the extent of a block on each axis; the last blocks of an axis may be cut.
        spans: the spans of each axis, as in `Tensors.read`.

    Returns:
        The values times their scales, float32.
    """
    part = select(values, spans)
    small = part.dtype.itemsize == 1
    out = _table(part.dtype)[part.view(np.uint8)] if small else part.astype(np.float32)
    whole = [*spans, *[None] * (values.ndim - len(spans))]
    *leading, last = map(_block_indices, whole, values.shape, blocks)
    of_rows = scales[np.ix_(*leading)].astype(np.float32)
    starts = np.flatnonzero(np.diff(last, prepend=-1))
    for start, stop in pairwise([*starts.tolist(), out.shape[-1]]):
        block = last[start]
        out[..., start:stop] *= of_rows[..., block : block + 1]
    return out


def widen_mxfp4(
    blocks: NDArray[np.uint8], scales: NDArray[np.uint8], *spans: Spans
) -> NDArray[np.float32]:
    """Widen MXFP4 as gpt-oss stores it.

    Args:
        blocks: the bytes of each group, `[..., rows, groups, 16] uint8`; the value in the lower
            four bits of a byte comes first.
        scales: the exponent of each group plus 127, `[..., rows, groups] uint8`; 255 is NaN.
        spans: the spans of the axes of the widened tensor, as in `Tensors.read`.

    Returns:
        The values, `[..., rows, groups * 32] float32`, of which spans select a part.
    """
    shape = (*scales.shape[:-1], scales.shape[-1] * MXFP4_GROUP)
    check_spans(shape, spans)
    whole: list[Spans] = [*spans, *[None] * (len(shape) - len(spans))]
    leading, columns = whole[:-1], whole[-1]
    blocks, scales = select(blocks, leading), select(scales, leading)
    if columns is not None and len(columns) == 1:
        return _widened_columns(blocks, scales, *columns[0])
    if columns is None:
        return _widened_columns(blocks, scales, 0, shape[-1])
    out = np.empty(selected_shape(shape, spans), np.float32)
    at = 0
    for start, stop in columns:
        out[..., at : at + stop - start] = _widened_columns(blocks, scales, start, stop)
        at += stop - start
    return out


def _widened_columns(
    blocks: NDArray[np.uint8], scales: NDArray[np.uint8], start: int, stop: int
) -> NDArray[np.float32]:
    """Return the values of some columns, of whole groups before they are cut."""
    first, last = start // MXFP4_GROUP, math.ceil(stop / MXFP4_GROUP)
    groups = _PAIRS[blocks[..., first:last, :]].view(np.float32)  # [..., rows, groups, 32]
    groups *= _POWERS[scales[..., first:last, None]]
    flat = groups.reshape(*groups.shape[:-2], (last - first) * MXFP4_GROUP)
    return flat[..., start - first * MXFP4_GROUP : stop - first * MXFP4_GROUP]


def _block_indices(of_axis: Spans, extent: int, block: int) -> NDArray[np.int64]:
    """Return the index of the block of each selected position; one index if all share one."""
    if block >= extent:
        return np.zeros(1, np.int64)
    if of_axis is None:
        return np.arange(extent) // block
    return np.concatenate([np.arange(*span) for span in of_axis] or [np.arange(0)]) // block


@functools.cache
def _table(dtype: np.dtype[Any]) -> NDArray[np.float32]:
    """Return the float32 value of each byte of a dtype, which is faster than a cast."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def _pairs() -> NDArray[np.uint64]:
    """Return the two float32 values of each byte, as one number of 64 bits."""
    values = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)
    byte = np.arange(256)
    return np.stack([values[byte & 15], values[byte >> 4]], axis=1).view(np.uint64).reshape(256)


def _powers() -> NDArray[np.float32]:
    """Return the scale of each exponent; the smallest, 2**-127, is subnormal in float32."""
    powers = np.ldexp(np.float32(1), np.arange(256) - _EXPONENT_BIAS, dtype=np.float32)
    powers[_NAN_EXPONENT] = np.nan
    return powers


_PAIRS = _pairs()
with np.errstate(over="ignore"):
    _POWERS = _powers()
