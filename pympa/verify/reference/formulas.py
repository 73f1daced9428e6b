"""The formulas of a transformer's parts in float64 NumPy, for any number of rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.verify.reference.erf import erf

F64 = NDArray[np.float64]


class Rounding:
    """The rounding of a run at fixed points of the formulas. This class rounds nothing."""

    def __call__(self, x: F64) -> F64:
        """Return an array as it is stored."""
        return x

    def product(self, a: F64, b: F64) -> F64:
        """Return a @ b for matrices."""
        y: F64 = a @ b
        return y


exactly = Rounding()


class RoundingTo(Rounding):
    """The rounding of a run: arrays are stored in a dtype, and products are summed in float32.

    Args:
        dtype: the dtype of the run.
        draw: a seed; 0 is plain rounding. Others give errors that are as likely: numbers are
            rounded to a grid with random stretch, and each sum is computed in two parts with a
            random cut.
    """

    def __init__(self, dtype: np.dtype[Any], draw: int = 0) -> None:
        self._dtype = dtype
        self._rng = np.random.default_rng(draw) if draw else None

    def __call__(self, x: F64) -> F64:
        """Return an array as it is stored."""
        stretch = 1.0 if self._rng is None else self._rng.uniform(0.5, 1.0)
        return (x * stretch).astype(self._dtype).astype(np.float64) / stretch

    def product(self, a: F64, b: F64) -> F64:
        """Return a @ b for matrices, summed in float32."""
        cut = 0 if self._rng is None else int(self._rng.integers(len(b) + 1))
        y = a[:, cut:].astype(np.float32) @ b[cut:].astype(np.float32)
        if cut:
            y += a[:, :cut].astype(np.float32) @ b[:cut].astype(np.float32)
        return y.astype(np.float64)


def sigmoid(x: F64) -> F64:
    """Return 1 / (1 + exp(-x)) without overflow."""
    y: F64 = 0.5 * (1.0 + np.tanh(0.5 * x))
    return y


def activate(x: F64, kind: str) -> F64:
    """Apply "none", "gelu" (erf), "gelu_tanh" or "silu" to `x` of any shape."""
    if kind == "none":
        return x
    if kind == "gelu":
        return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))
    if kind == "gelu_tanh":
        return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    if kind == "silu":
        return x * sigmoid(x)
    raise ValueError(f"activation: expected none, gelu, gelu_tanh or silu; got {kind!r}")


def linear(x: F64, weight: F64, bias: F64 | None = None, rounding: Rounding = exactly) -> F64:
    """Return x @ weight.T + bias for x `[rows, k]`, weight `[n, k]`; not rounded after the sum."""
    y = rounding.product(x, weight.T)
    return y if bias is None else y + bias


def norm(x: F64, weight: F64, bias: F64 | None, eps: float, kind: str, offset: float = 0.0) -> F64:
    """Normalise the last axis of `x`, "rms" or "layer", with the gains weight + offset."""
    if kind == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    y: F64 = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * (weight + offset)
    return y if bias is None else y + bias


def clamped_swiglu(gate: F64, up: F64, limit: float, alpha: float) -> F64:
    """Return the hidden state of a clamped SwiGLU (gpt-oss) from its two products."""
    gate = np.minimum(gate, limit)
    y: F64 = gate * sigmoid(alpha * gate) * (np.clip(up, -limit, limit) + 1.0)
    return y


def mlp(
    x: F64,
    up: F64,
    down: F64,
    gate: F64 | None,
    activation: str,
    up_bias: F64 | None = None,
    gate_bias: F64 | None = None,
    down_bias: F64 | None = None,
    rounding: Rounding = exactly,
    *,
    limit: float = 0.0,
    alpha: float = 0.0,
) -> F64:
    """Return the plain MLP act(x up) down, or the gated one (act(x gate) * (x up)) down.

    Its hidden state is rounded; its output is not. `limit` and `alpha` are those of
    "swiglu_clamped".
    """
    hidden = linear(x, up, up_bias, rounding)
    if gate is None:
        hidden = activate(hidden, activation)
    elif activation == "swiglu_clamped":
        hidden = clamped_swiglu(linear(x, gate, gate_bias, rounding), hidden, limit, alpha)
    else:
        hidden *= activate(linear(x, gate, gate_bias, rounding), activation)
    return linear(rounding(hidden), down, down_bias, rounding)
