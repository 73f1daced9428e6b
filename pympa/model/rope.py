"""The tables of rotary position embeddings (formulas and sources: `pympa.spec.rope`)."""

from __future__ import annotations

import math

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

_ANGLES = 4096  # the number of positions whose sines are computed at once

F64 = NDArray[np.float64]


def fill_table(
    out: NDArray[np.float32],
    function: np.ufunc,
    positions: NDArray[np.int64],
    rope: Rope,
    context: int | None,
) -> None:
    """Fill a table of cos or sin, float32 `[positions, pairs]`.

    Frequencies are rounded to float32, as models were trained with; angles are float64, so that
    they are exact at any position.

    Args:
        out: the table.
        function: `np.cos` or `np.sin`.
        positions: the positions.
        rope: the embedding.
        context: the declared number of tokens of the model; None if the embedding needs none.
    """
    frequencies = pair_frequencies(rope, 2 * out.shape[1], context).astype(np.float32)
    factor = attention_factor(rope)
    for at in range(0, len(positions), _ANGLES):
        here = slice(at, at + _ANGLES)
        out[here] = factor * function(positions[here, None] * frequencies.astype(np.float64))


def pair_frequencies(rope: Rope, rotated: int, context: int | None) -> F64:
    """Return the radians by which each pair turns from one position to the next, `[pairs]`.

    Args:
        rope: the embedding.
        rotated: the number of dimensions that rotate.
        context: the declared number of tokens of the model; None if the embedding needs none.

    Raises:
        SpecError: the embedding depends on the context, and none is given.
    """
    scaling, theta = rope.scaling, rope.theta
    exponents = np.arange(0, rotated, 2) / rotated
    if isinstance(scaling, DynamicScaling):
        theta *= _growth(scaling, _given(context)) ** (rotated / (rotated - 2))
    plain: F64 = theta**-exponents
    if isinstance(scaling, LinearScaling):
        plain /= scaling.factor
    if isinstance(scaling, LongRopeScaling):
        long = rope.depends_on_context and _given(context) > scaling.trained_context
        plain /= np.array(scaling.long if long else scaling.short)
    if isinstance(scaling, Llama3Scaling):
        return _blend(plain, scaling.factor, _llama3_divided(scaling, plain))
    if isinstance(scaling, YarnScaling):
        return _blend(plain, scaling.factor, _yarn_divided(scaling, theta, rotated))
    return plain


def attention_factor(rope: Rope) -> float:
    """Return the number by which rotated dimensions of q and k are multiplied."""
    scaling = rope.scaling
    if not isinstance(scaling, YarnScaling | LongRopeScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    growth = math.log(max(scaling.factor, 1.0))
    if isinstance(scaling, YarnScaling):
        return 1.0 + 0.1 * growth
    return math.sqrt(1.0 + growth / math.log(scaling.trained_context))


def _given(context: int | None) -> int:
    if context is None:
        raise SpecError(
            "context: expected a number of tokens, because rope.scaling is dynamic or longrope; "
            "got none"
        )
    return context


def _growth(scaling: DynamicScaling, context: int) -> float:
    """Return the factor on theta before its exponent."""
    excess = max(context - scaling.trained_context, 0) / scaling.trained_context
    return 1.0 + scaling.factor * excess


def _blend(plain: F64, factor: float, divided: F64) -> F64:
    """Return frequencies of which shares are divided by a factor, and the rest are not."""
    blended: F64 = plain * (1.0 - divided) + plain / factor * divided
    return blended


def _llama3_divided(scaling: Llama3Scaling, plain: F64) -> F64:
    """Return the share of each pair's frequency that is divided."""
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = scaling.trained_context * plain / (2.0 * math.pi)
    divided: F64 = np.clip((high - turns) / (high - low), 0.0, 1.0)
    return divided


def _yarn_divided(scaling: YarnScaling, theta: float, rotated: int) -> F64:
    """Return the share of each pair's frequency that is divided."""
    turns = np.array([scaling.beta_fast, scaling.beta_slow])
    wavelengths = scaling.trained_context / (2.0 * math.pi * turns)
    first, last = rotated * np.log(wavelengths) / (2.0 * math.log(theta))
    if scaling.truncate:
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0.0), min(last, rotated - 1.0)
    if first == last:
        last += 0.001
    divided: F64 = np.clip((np.arange(rotated // 2) - first) / (last - first), 0.0, 1.0)
    return divided
