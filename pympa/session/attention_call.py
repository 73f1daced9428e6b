"""A user's call of attention: its arguments are checked and converted for kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from pympa.kernels import AttentionSpec
from pympa.plan.mesh import Plan
from pympa.runtime.arena import Array
from pympa.spec import DTYPES

_FARTHEST = 1 << 40  # a larger window hides nothing more, and sums with this one stay small


class AttentionArguments(NamedTuple):
    """q `[rows, heads, head_dim]`, k and v `[rows, kv_heads, dim]`, and their parameters."""

    q: Array
    k: Array
    v: Array
    spec: AttentionSpec

    @property
    def summary(self) -> str:
        """The arguments that must be the same on all ranks."""
        arrays = zip("qkv", (self.q, self.k, self.v), strict=True)
        shapes = ", ".join(f"{name} {a.dtype} {a.shape[1:]}" for name, a in arrays)
        spec = self.spec
        return (
            f"{shapes}, causal {spec.causal}, scale {spec.scale}, window {spec.window}, "
            f"softcap {spec.softcap}"
        )


def check_lengths(lengths: Sequence[int]) -> list[int]:
    """Return the number of tokens of each sequence.

    Raises:
        ValueError: a length is not a whole number of at least 0.
    """
    known = isinstance(lengths, (Sequence, np.ndarray)) and getattr(lengths, "ndim", 1) == 1
    if not known or not all(_is_whole(n) and n >= 0 for n in lengths):
        raise ValueError(
            f"lengths: expected a list of whole numbers of at least 0; got {lengths!r}"
        )
    return [int(n) for n in lengths]


def check_call(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> AttentionArguments:
    """Check the arguments of a user.

    Raises:
        ValueError: an argument is not allowed; the message names it, what is allowed and what it
            is.
    """
    for name, array in zip("qkv", (q, k, v), strict=True):
        _check_array(name, array)
    for name, array in (("k", k), ("v", v)):
        if array.dtype != q.dtype:
            raise ValueError(f"{name}: expected {q.dtype}, as q; got {array.dtype}")
        if len(array) != len(q):
            raise ValueError(f"{name}: expected {len(q)} rows, as q; got {len(array)}")
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    if not 1 <= kv_heads <= heads:
        raise ValueError(
            f"k: expected 1 to {heads} kv heads, because q has {heads} heads; got {kv_heads}"
        )
    if k.shape[2] != head_dim:
        raise ValueError(f"k: expected a head_dim of {head_dim}, as q; got {k.shape[2]}")
    if v.shape[1] != kv_heads:
        raise ValueError(f"v: expected {kv_heads} kv heads, as k; got {v.shape[1]}")
    if not isinstance(causal, (bool, np.bool_)):
        raise ValueError(f"causal: expected True or False; got {causal!r}")
    if window is not None and not (_is_whole(window) and window >= 1):
        raise ValueError(f"window: expected a whole number of at least 1, or None; got {window!r}")
    spec = AttentionSpec(
        kv_head_of_q=(np.arange(heads) * kv_heads // heads).astype(np.int32),
        scale=1.0 / math.sqrt(head_dim) if scale is None else _finite("scale", scale),
        causal=bool(causal),
        window=None if window is None else min(int(window), _FARTHEST),
        softcap=None if softcap is None else _finite("softcap", softcap),
    )
    return AttentionArguments(q, k, v, spec)


def check_plan(plan: Plan) -> None:
    """Refuse a plan whose ranks do not have whole heads of their own rows.

    Raises:
        ValueError: the plan is not allowed; the message names it.
    """
    if plan.head_exchange > 1 or plan.dim > 1 or plan.cp_scheme != "ring":
        raise ValueError(
            f"plan {plan}: ring_attention expects dim=1, cp_scheme=ring and no ulysses, so that "
            "each rank has whole heads"
        )


def _check_array(name: str, array: Any) -> None:
    kind = type(array)
    if not hasattr(array, "flags") or not hasattr(array, "dtype"):
        how = "; pass q.numpy()" if kind.__module__.partition(".")[0] == "torch" else ""
        raise ValueError(
            f"{name}: expected a NumPy array, or a CuPy array with backend cuda; "
            f"got {kind.__module__}.{kind.__qualname__}{how.replace('q', name, 1)}"
        )
    if array.ndim != 3:
        raise ValueError(f"{name}: expected an array [rows, heads, head_dim]; got {array.shape}")
    if array.dtype not in DTYPES.values():
        raise ValueError(f"{name}: expected {', '.join(DTYPES)}; got {array.dtype}")
    if array.shape[2] < 1:
        raise ValueError(f"{name}: expected a head_dim of at least 1; got {array.shape}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _finite(name: str, value: Any) -> float:
    """Return a number as float.

    Raises:
        ValueError: the value is not a number, or too large for float32.
    """
    known = isinstance(value, Real) and not isinstance(value, bool)
    if not known or not abs(value) <= float(np.finfo(np.float32).max):
        raise ValueError(f"{name}: expected a finite float32 number, or None; got {value!r}")
    return float(value)
