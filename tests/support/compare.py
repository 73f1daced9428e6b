"""What results are held against: float64 within the contract, or the same bits.

How far a result may be off belongs to its dtype (`pympa.verify.contract.TOLERANCE`), never to a
test.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pympa.spec import DTYPES
from pympa.verify.contract import TOLERANCE, WORST_ROW_FACTOR

HALVES = (DTYPES["bfloat16"], DTYPES["float16"])
"""What attention and products of a GPU compute in."""

ALL_DTYPES = (*HALVES, DTYPES["float32"])

Array = np.ndarray[Any, Any]

SAME_NUMBERS = 1e-12
"""Of the typical element: what two ways of rounding one formula in float64 are apart."""

_TINY = 1e-30  # an exact zero is off by nothing


def normal(
    rng: np.random.Generator, shape: int | tuple[int, ...], dtype: Any, scale: float = 1.0
) -> Array:
    """Return normal numbers of a dtype."""
    return (rng.standard_normal(shape) * scale).astype(np.float32).astype(dtype)


def wide(array: Any) -> Array:
    """Return an array in float64."""
    return np.asarray(array).astype(np.float64)


def tolerance_of(dtype: Any) -> float:
    """Return what the contract allows a result of a dtype to be off by, relative to its norm."""
    return TOLERANCE[np.dtype(dtype).name]


def assert_close(got: Any, want: Any, dtype: Any) -> None:
    """Compare with float64 as the contract does: the norm, and the worst row by 8; no NaN."""
    got, want = wide(got), wide(want)
    assert got.shape == want.shape
    if not got.size:
        return
    tolerance = tolerance_of(dtype)
    assert np.isfinite(got).all(), "NaN, or an element that was not written"
    error = np.linalg.norm(got - want)
    assert error <= tolerance * np.linalg.norm(want) + _TINY, error / np.linalg.norm(want)
    rows = np.sqrt(((got - want) ** 2).reshape(len(got), -1).sum(axis=1))
    typical = np.sqrt((want**2).sum() / len(want))
    allowed = WORST_ROW_FACTOR * tolerance * typical + _TINY
    assert rows.max() <= allowed, (rows.argmax(), rows.max() / typical)


def assert_each_close(got: Any, want: Any, dtype: Any, *, least: float = _TINY) -> None:
    """Compare each element with float64, within the contract's tolerance of a norm.

    Args:
        got: the result.
        want: what it should be.
        dtype: of the result.
        least: what is smaller may be off by as much as this may.
    """
    got, want = wide(got), wide(want)
    assert got.shape == want.shape
    off = np.abs(got - want) / np.maximum(np.abs(want), least)
    assert not np.isnan(off).any()
    assert off.max(initial=0.0) <= tolerance_of(dtype), (off.argmax(), off.max())


def assert_lse_close(got: Any, want: Any, dtype: Any) -> None:
    """Compare log-sums of probabilities of a dtype with float64; where nothing is seen, -inf.

    A rounded probability is off by half the tolerance of its dtype at most, relative to itself, and
    their sum by half as much, as `Session.ring_attention` promises; that is an absolute error of
    its logarithm. Scores are float32, and the logarithm is as large as they are.
    """
    got, want = wide(got), wide(want)
    assert got.shape == want.shape
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    seen = np.isfinite(want)
    assert np.isfinite(got[seen]).all()
    allowed = tolerance_of(dtype) / 4 + tolerance_of(np.float32) / 2 * np.abs(want[seen])
    off = np.abs(got[seen] - want[seen]) / allowed
    assert off.max(initial=0.0) <= 1, off.max()


def assert_same_bits(got: Array, want: Array) -> None:
    """Compare byte by byte."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    different = (raw_rows(got) != raw_rows(want)).any(axis=1)
    assert not different.any(), f"rows {np.flatnonzero(different)[:8]} of {len(got)} differ"


def assert_same_numbers(got: Any, want: Any) -> None:
    """Compare two float64 computations of one formula: their norm, and each element by it."""
    got, want = wide(got), wide(want)
    assert got.shape == want.shape
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    seen = np.isfinite(want)
    np.testing.assert_array_equal(got[~seen], want[~seen])
    size = np.sqrt((want[seen] ** 2).mean()) if seen.any() else 0.0
    off = np.abs(got[seen] - want[seen]).max(initial=0.0)
    assert off <= SAME_NUMBERS * size, off / size


def raw_rows(array: Array) -> Array:
    """Return the bytes of each row."""
    plain = np.ascontiguousarray(array)
    return plain.view(np.uint8).reshape(len(plain), -1) if plain.size else np.empty((0, 1))
