"""Random calls of kernels: what is drawn, and how it looks on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from pympa.kernels import AttentionSpec, KvBlock, State
from pympa.plan.layout import Layout, Range
from pympa.verify import reference
from support.compare import HALVES, normal, wide
from support.rig import Rig

HEAD_DIMS = (64, 128, 256, 512, 7, 8, 40, 96, 100, 130, 511)
"""Of the kernels, and some that they pad; a single column of v might nearly vanish in its sum."""


@dataclass
class Attention:
    """One call of `attend_block` as the host has it.

    q_ranges and k_ranges are (sequence, start, length) in the order of rows.
    """

    q: np.ndarray[Any, Any]
    k: np.ndarray[Any, Any]
    v: np.ndarray[Any, Any]
    q_ranges: list[tuple[int, int, int]]
    k_ranges: list[tuple[int, int, int]]
    spec: AttentionSpec

    @property
    def dtype(self) -> Any:
        """Of q, k and v."""
        return self.q.dtype

    def expected(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return o and lse in float64."""
        o = np.zeros((*self.q.shape[:2], self.v.shape[2]))
        lse = np.full(self.q.shape[:2], -np.inf)
        q_at, k_at = _places(self.q_ranges), _places(self.k_ranges)
        for sequence in set(q_at[:, 0].tolist()):
            rows, keys = (np.flatnonzero(at[:, 0] == sequence) for at in (q_at, k_at))
            o[rows], lse[rows] = reference.attention(
                wide(self.q[rows]),
                wide(self.k[keys]),
                wide(self.v[keys]),
                q_at[rows, 1],
                k_at[keys, 1],
                kv_head_of_q=self.spec.kv_head_of_q.tolist(),
                scale=self.spec.scale,
                causal=self.spec.causal,
                window=self.spec.window,
                softcap=self.spec.softcap,
            )
        return o, lse

    def sees(self) -> np.ndarray[Any, Any]:
        """Return which rows see which keys, bool `[rows, keys]`."""
        q_at, k_at = _places(self.q_ranges), _places(self.k_ranges)
        distance = q_at[:, None, 1] - k_at[None, :, 1]
        seen = q_at[:, None, 0] == k_at[None, :, 0]
        if self.spec.causal:
            seen &= distance >= 0
        return seen if self.spec.window is None else seen & (np.abs(distance) < self.spec.window)


def _places(ranges: list[tuple[int, int, int]]) -> np.ndarray[Any, Any]:
    """Return (sequence, position) of each row."""
    found = [(s, start + i) for s, start, length in ranges for i in range(length)]
    return np.array(found, np.int64).reshape(-1, 2)


def layout(ranges: list[tuple[int, int, int]]) -> Layout:
    """Return ranges as kernels take them."""
    return Layout(tuple(Range(*r) for r in ranges if r[2]))


def attend(
    rig: Rig,
    call: Attention,
    state: State,
    rows: slice = slice(None),
    keys: slice = slice(None),
) -> None:
    """Fold some keys of a call into the state of some of its rows."""
    q_layout, k_layout = layout(call.q_ranges), layout(call.k_ranges)
    q_start, q_stop, _ = rows.indices(len(call.q))
    k_start, k_stop, _ = keys.indices(len(call.k))
    kv = KvBlock(rig.put(call.k[keys]), rig.put(call.v[keys]), k_layout.slice(k_start, k_stop))
    q = rig.put(call.q[rows])
    rig.kernels.attend_block(q, q_layout.slice(q_start, q_stop), kv, state, call.spec)


def attention_of(
    rig: Rig, call: Attention, rows: slice = slice(None)
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return o and lse of some rows of a call, from an empty state."""
    with rig.scope():
        count = len(range(*rows.indices(len(call.q))))
        state = rig.new_state(count, call.q.shape[1], call.v.shape[2])
        attend(rig, call, state, rows)
        return rig.finish(state, call.dtype)


@st.composite
def attentions(draw: Any, rig: Rig, *, plain: bool = False) -> Attention:
    """Draw a call.

    Args:
        draw: by hypothesis.
        rig: it must be small enough for.
        plain: one sequence whose rows and keys begin at position 0.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(HALVES))
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    v_head_dim = draw(st.sampled_from([head_dim, head_dim, *HEAD_DIMS]))
    kv_heads = draw(st.integers(1, rig.most(4, 2)))
    heads = draw(st.integers(kv_heads, rig.most(9, 3)))
    kv_head_of_q = np.sort(rng.integers(0, kv_heads, heads)).astype(np.int32)
    most_rows, most_keys = rig.most(400, 150), rig.most(1800, 1100)
    sequences = 1 if plain else draw(st.integers(1, 3))
    q_ranges, k_ranges = [], []
    for sequence in range(sequences):
        keys = draw(st.integers(0 if sequences > 1 else 1, most_keys // sequences))
        k_start = 0 if plain else draw(st.sampled_from([0, 0, 512, 37]))
        rows = draw(st.integers(0 if sequences > 1 else 1, most_rows // sequences))
        q_start = 0 if plain else draw(st.integers(0, k_start + keys))
        k_ranges.append((sequence, k_start, keys))
        q_ranges.append((sequence, q_start, rows))
    if draw(st.booleans()):
        q_ranges.reverse()
    rows, keys = (sum(r[2] for r in ranges) for ranges in (q_ranges, k_ranges))
    spec = AttentionSpec(
        kv_head_of_q,
        head_dim**-0.5,
        draw(st.booleans()),
        draw(st.sampled_from([None, None, None, 1, 33, 700])),
        draw(st.sampled_from([None, None, 8.0])),
    )
    return Attention(
        normal(rng, (rows, heads, head_dim), dtype, 1.5),
        normal(rng, (keys, kv_heads, head_dim), dtype, 1.5),
        normal(rng, (keys, kv_heads, v_head_dim), dtype),
        q_ranges,
        k_ranges,
        spec,
    )


@dataclass
class Product:
    """One call of `linear` or `mlp` as the host has it; `groups` is None for one weight."""

    x: np.ndarray[Any, Any]
    groups: list[int] | None
    n: int
    rng: np.random.Generator

    @property
    def dtype(self) -> Any:
        """Of all arrays."""
        return self.x.dtype

    def weight(self, n: int, k: int) -> np.ndarray[Any, Any]:
        """Return a weight `[n, k]`, or one for each group."""
        shape = (n, k) if self.groups is None else (len(self.groups), n, k)
        return normal(self.rng, shape, self.dtype, k**-0.5)

    def bias(self, n: int) -> np.ndarray[Any, Any]:
        """Return a bias `[n]`, or one for each group."""
        return normal(self.rng, (n,) if self.groups is None else (len(self.groups), n), self.dtype)

    def parts(self) -> list[tuple[slice, int | tuple[()]]]:
        """Return the rows of each group, and what selects its weight and bias."""
        if self.groups is None:
            return [(slice(None), ())]
        pairs = enumerate(zip(self.groups, np.cumsum(self.groups), strict=True))
        return [(slice(end - rows, end), i) for i, (rows, end) in pairs]

    def group_rows(self) -> np.ndarray[Any, Any] | None:
        """Return what kernels are told of groups."""
        return None if self.groups is None else np.array(self.groups, np.int64)


@st.composite
def products(draw: Any, rig: Rig) -> Product:
    """Draw rows and a width, neither of them round."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups = draw(st.none() | st.lists(st.integers(0, rig.most(200, 20)), min_size=1, max_size=5))
    rows = draw(st.integers(0, rig.most(1200, 60))) if groups is None else sum(groups)
    k = draw(st.sampled_from([1, 7, 8, 64, 100, 513]) | st.integers(1, rig.most(1500, 60)))
    n = draw(st.sampled_from([1, 3, 16, 64, 130]) | st.integers(1, rig.most(900, 40)))
    dtype = draw(st.sampled_from(HALVES))
    return Product(normal(rng, (rows, k), dtype), groups, n, rng)
