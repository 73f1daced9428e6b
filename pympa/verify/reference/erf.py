"""The error function for arrays, which NumPy lacks, with an error of a few ulp of float64.

It uses the rational Chebyshev approximations of W. J. Cody, "Rational Chebyshev approximations for
the error function", Mathematics of Computation 23 (1969), 631-637, with the coefficients of his
program CALERF (netlib, specfun):

- up to 0.46875: x·A(x²)/B(x²), also for negative x;
- up to 4: 1 - exp(-x²)·C(x)/D(x);
- up to 6: 1 - (exp(-x²)/x)·(1/√π - P(1/x²)/(x²·Q(1/x²)));
- from 6 on: 1; and erf(-x) = -erf(x).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

# Coefficients by falling power; the first one of each denominator is 1.
_A = (
    1.85777706184603153e-1, 3.16112374387056560e00, 1.13864154151050156e02,
    3.77485237685302021e02, 3.20937758913846947e03,
)  # fmt: skip
_B = (
    1.0, 2.36012909523441209e01, 2.44024637934444173e02, 1.28261652607737228e03,
    2.84423683343917062e03,
)  # fmt: skip
_C = (
    2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e00,
    6.61191906371416295e01, 2.98635138197400131e02, 8.81952221241769090e02,
    1.71204761263407058e03, 2.05107837782607147e03, 1.23033935479799725e03,
)  # fmt: skip
_D = (
    1.0, 1.57449261107098347e01, 1.17693950891312499e02, 5.37181101862009858e02,
    1.62138957456669019e03, 3.29079923573345963e03, 4.36261909014324716e03,
    3.43936767414372164e03, 1.23033935480374942e03,
)  # fmt: skip
_P = (
    1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1,
    1.25781726111229246e-1, 1.60837851487422766e-2, 6.58749161529837803e-4,
)  # fmt: skip
_Q = (
    1.0, 2.56852019228982242e00, 1.87295284992346725e00, 5.27905102951428412e-1,
    6.05183413124413191e-2, 2.33520497626869185e-3,
)  # fmt: skip
_NEAR, _FAR = 0.46875, 4.0
_ONE = 6.0  # from this value on erf is 1 in float64
_CHUNK = 1 << 15  # elements whose temporary arrays fit a core's cache


def erf(x: NDArray[Any]) -> F64:
    """Return the error function of x, of any shape; NaN stays NaN."""
    x = np.asarray(x, np.float64)
    out = np.empty(x.size)
    flat = x.ravel()
    for at in range(0, x.size, _CHUNK):
        here = slice(at, at + _CHUNK)
        out[here] = _erf(flat[here])
    return out.reshape(x.shape)


def _erf(x: F64) -> F64:
    magnitude = np.abs(x)
    out = np.sign(x)  # NaN for NaN
    near = np.flatnonzero(magnitude <= _NEAR)
    middle = np.flatnonzero((magnitude > _NEAR) & (magnitude <= _FAR))
    far = np.flatnonzero((magnitude > _FAR) & (magnitude < _ONE))
    out[near] = x[near] * _ratio(_A, _B, x[near] ** 2)
    y = magnitude[middle]
    out[middle] *= 1.0 - np.exp(-y * y) * _ratio(_C, _D, y)
    y = magnitude[far]
    square = 1.0 / (y * y)
    tail = 1.0 / math.sqrt(math.pi) - square * _ratio(_P, _Q, square)
    out[far] *= 1.0 - np.exp(-y * y) * tail / y
    return out


def _ratio(above: Sequence[float], below: Sequence[float], x: F64) -> F64:
    """Return one polynomial over another, by Horner's rule."""
    numerator, denominator = np.full_like(x, above[0]), np.full_like(x, below[0])
    for a, b in zip(above[1:], below[1:], strict=True):
        numerator *= x
        numerator += a
        denominator *= x
        denominator += b
    numerator /= denominator
    return numerator
