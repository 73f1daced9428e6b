"""Rotary position embeddings by their formulas, pair by pair (sources: `pympa.spec.rope`)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    SpecError,
    YarnScaling,
)
from pympa.verify.reference.formulas import F64


def rope(x: F64, positions: NDArray[Any], spec: Rope, context: int | None = None) -> F64:
    """Rotate x `[rows, heads, head_dim]` by its rows' positions.

    Frequencies are rounded to float32, as models were trained with; angles are float64.

    Args:
        x: queries or keys.
        positions: the position of each row.
        spec: the embedding.
        context: the declared number of tokens of the model.
    """
    rotated, head_dim = spec.rotated(x.shape[-1]), x.shape[-1]
    pairs = range(rotated // 2)
    frequency = np.array([_frequency(spec, i, rotated, context) for i in pairs])
    angle = np.asarray(positions, np.float64)[:, None] * frequency.astype(np.float32)
    factor = attention_factor(spec)
    cos, sin = np.cos(angle)[:, None] * factor, np.sin(angle)[:, None] * factor
    start = head_dim - rotated if spec.trailing else 0
    near, far = (2, 1) if spec.interleaved else (1, rotated // 2)
    first = np.array([start + near * i for i in pairs], int)
    second = first + far
    y = x.copy()
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    return y


def attention_factor(spec: Rope) -> float:
    """Return the number by which rotated queries and keys are multiplied."""
    scaling = spec.scaling
    if not isinstance(scaling, YarnScaling | LongRopeScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1.0:
        return 1.0
    if isinstance(scaling, YarnScaling):
        return 0.1 * math.log(scaling.factor) + 1.0
    return math.sqrt(1.0 + math.log(scaling.factor) / math.log(scaling.trained_context))


def _frequency(spec: Rope, pair: int, rotated: int, context: int | None) -> float:
    """Return the radians by which a pair turns from one position to the next."""
    scaling, theta = spec.scaling, spec.theta
    plain = math.pow(theta, -2.0 * pair / rotated)
    if scaling is None:
        return plain
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        turns = scaling.trained_context * plain / (2.0 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        share = min(max((turns - low) / (high - low), 0.0), 1.0)  # 1: not divided
        return plain * (share + (1.0 - share) / scaling.factor)
    if isinstance(scaling, YarnScaling):
        share = _ramp(scaling, theta, rotated, pair)  # 1: divided
        return plain * (1.0 - share + share / scaling.factor)
    if isinstance(scaling, LongRopeScaling) and scaling.short == scaling.long:
        return plain / scaling.short[pair]
    if context is None:
        raise SpecError("context: expected a number of tokens for dynamic and longrope; got none")
    if isinstance(scaling, DynamicScaling):
        longer = max(context, scaling.trained_context) / scaling.trained_context
        growth = scaling.factor * longer - (scaling.factor - 1.0)
        return math.pow(theta * math.pow(growth, rotated / (rotated - 2)), -2.0 * pair / rotated)
    divisors = scaling.long if context > scaling.trained_context else scaling.short
    return plain / divisors[pair]


def _ramp(scaling: YarnScaling, theta: float, rotated: int, pair: int) -> float:
    """Return how far a pair is on the ramp from the fast ones, 0, to the slow ones, 1."""

    def pair_with(turns: float) -> float:
        wavelength = scaling.trained_context / turns
        return rotated * math.log(wavelength / (2.0 * math.pi)) / (2.0 * math.log(theta))

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    width = last - first or 0.001
    return min(max((pair - first) / width, 0.0), 1.0)
