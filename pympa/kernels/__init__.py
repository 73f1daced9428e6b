"""The operations that strategies may use on local arrays.

`Kernels` is complete: a strategy uses arrays only through it, through a transport and by slicing.
The caller allocates every output from its arena; the last axis of every array is contiguous. dtype
means float32, float16 or bfloat16, the same for all arrays of a call unless the text says
otherwise; sums are float32 and results are rounded to the dtype once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pympa.plan.layout import Layout
from pympa.runtime.arena import Array
from pympa.spec import LEAST_FACTOR, MOST_FACTOR, Routing, SpecError, check_softcap

LOADED_BYTES = 8 << 20  # of a weight that is converted and packed at a time: the caches hold it
PANEL_ROWS = 64  # a multiple of the rows of a panel of each backend
DEFAULT_ROUTING = Routing()
"""The choice of experts by a softmax of all logits, without groups."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight `[n, k]` in the order in which a backend's kernels read it.

    `data` is `[bytes]`, or `[count, bytes]` for a group of weights of the same shape.
    """

    data: Array
    n: int
    k: int


@dataclass(frozen=True)
class MlpWeights:
    """An MLP without the bias of its last product: down(act(up(x))), or down(act(gate(x)) * up(x)).

    up, gate `[hidden, d]`, down `[d_out, hidden]`, biases `[hidden]`; or groups of these. limit and
    alpha are those of "swiglu_clamped", see `LayerSpec`.
    """

    up: PackedWeight
    down: PackedWeight
    activation: str
    up_bias: Array | None = None
    gate: PackedWeight | None = None
    gate_bias: Array | None = None
    limit: float = 0.0
    alpha: float = 0.0


class State(NamedTuple):
    """The running state of attention, float32, natural log (Milakov & Gimelshein 2018).

    row_max and row_sum are `[rows, heads]`; out is `[rows, heads, v_head_dim]`, unnormalised.
    """

    row_max: Array
    row_sum: Array
    out: Array

    def rows(self, start: int, stop: int) -> State:
        """Return the state of rows `start:stop`."""
        return State(self.row_max[start:stop], self.row_sum[start:stop], self.out[start:stop])


class KvBlock(NamedTuple):
    """Keys `[rows, kv_heads, head_dim]` and values `[rows, kv_heads, v_head_dim]` with a layout.

    Attributes:
        k: the keys.
        v: the values.
        layout: the ranges of keys.
        first_rows: the row of the first key of each range, int64 `[ranges]`: ranges may lie
            anywhere in k and v, like pages of a cache. None means one after the other. Consecutive
            ranges that adjoin count as one, whatever their rows; on a GPU they may adjoin in other
            rows only between key tiles (64 positions, or 512 to decode).
    """

    k: Array
    v: Array
    layout: Layout
    first_rows: NDArray[np.int64] | None = None

    @property
    def ranges(self) -> NDArray[np.int64]:
        """The ranges as int64 `[n, 4]` (sequence, start, length, first row)."""
        if self.first_rows is None:
            return self.layout.key_ranges
        return np.column_stack([self.layout.array, self.first_rows])

    def slice(self, start: int, stop: int) -> KvBlock:
        """Return keys `start:stop`, counted in the order of the ranges."""
        layout = self.layout.slice(start, stop)
        if self.first_rows is None:
            return KvBlock(self.k[start:stop], self.v[start:stop], layout)
        starts = self.layout.key_ranges[:, 3]  # of the ranges, in this count
        first = int(np.searchsorted(starts, start, "right")) - 1
        here = slice(first, first + len(layout.ranges))
        first_rows = self.first_rows[here] + np.maximum(start - starts[here], 0)
        return KvBlock(self.k, self.v, layout, first_rows)


@dataclass(frozen=True)
class AttentionSpec:
    """The parameters of `attend_block` that do not depend on the rows.

    Attributes:
        kv_head_of_q: the local kv head of each local query head, int32 `[heads]`.
        scale: the factor on q·k.
        causal: whether keys after the query are hidden.
        window: the distance, in positions, from which on keys are hidden; None for no window.
        softcap: the cap in softcap * tanh(score / softcap) on scores; None means no cap.
        decode: whether few rows attend to many keys: a phase that may have other bits.

    Raises:
        SpecError: a scale or softcap is out of the range of float32.
    """

    kv_head_of_q: NDArray[np.int32]
    scale: float
    causal: bool
    window: int | None = None
    softcap: float | None = None
    decode: bool = False

    def __post_init__(self) -> None:
        check_softcap(self.softcap)
        if self.scale and not LEAST_FACTOR <= abs(self.scale) <= MOST_FACTOR:
            raise SpecError(
                f"scale: expected 0 or a number from {LEAST_FACTOR:.3g} to {MOST_FACTOR:g}, or its "
                f"negative; got {self.scale:g}"
            )


def rows_at_once(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """Return how many rows of a tensor are loaded at a time: whole panels of each backend."""
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    return max(LOADED_BYTES // max(row_bytes, 1) // PANEL_ROWS, 1) * PANEL_ROWS


class Kernels(Protocol):
    """Computation on one rank's arrays."""

    piece_flops: float
    """The attention flops after which a rank should poll its messages (about 5 ms)."""

    row_chunk: int
    """The rows whose MLP hidden state should exist at a time; it changes memory and speed only."""

    dispatch_rows: int
    """The rows that should be sent to experts together; more would overlap less."""

    def fill(self, out: Array, write: Callable[[Array], None]) -> None:
        """Let `write` fill in an array of the host, and copy it to `out`."""

    def read(self, array: Array) -> NDArray[Any]:
        """Return a copy on the host of an array, after all kernels that write it."""

    def pack(
        self,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        read: Callable[[int, int, Array], Array],
    ) -> PackedWeight:
        """Return a weight `[n, k]`, packed, in memory of the arena.

        `read(first, last, out)` returns some of its rows on the host: `out`, filled, or an array of
        its shape and dtype with the elements of a row side by side. It is used before the next
        call.
        """

    def pack_group(
        self,
        count: int,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        read: Callable[[int, int, int, Array], Array],
    ) -> PackedWeight:
        """Return `count` weights `[n, k]`, such as experts'; `read` first gets the index of one."""

    def linear(
        self,
        x: Array,
        weight: PackedWeight,
        out: Array,
        *,
        bias: Array | None = None,
        activation: str = "none",
        residual: Array | None = None,
        branch: Array | None = None,
        group_rows: NDArray[np.int64] | None = None,
    ) -> None:
        """Compute branch = act(x weight^T + bias); out = residual + branch, or branch.

        x `[rows, k]`, out, residual and branch `[rows, n]`, bias `[n]`. `out` may be `residual`,
        and may be float32 for logits. With `group_rows` `[groups]` the weight is a group: the
        first group_rows[0] rows use its first weight, and so on; then bias is `[groups, n]`.
        A row's bits depend only on its own weight.
        """

    def mlp(
        self,
        x: Array,
        weights: MlpWeights,
        out: Array,
        *,
        bias: Array | None = None,
        residual: Array | None = None,
        branch: Array | None = None,
        group_rows: NDArray[np.int64] | None = None,
    ) -> None:
        """Compute branch = MLP(x) + bias; out = residual + branch, or branch.

        The hidden state is rounded to the dtype; gated (Shazeer 2020), its product is rounded once.
        x `[rows, d]`, out, residual and branch `[rows, d_out]`, bias `[d_out]`. `out` may be
        `residual` or x. group_rows: see `linear`.
        """

    def start_state(self, state: State, sinks: Array | None = None) -> None:
        """Initialise a state without keys, or with one key that has a score and no value.

        sinks `[heads]`: these scores, of any dtype: row_max = sink, row_sum = 1, out = 0.
        """

    def attend_block(
        self, q: Array, q_layout: Layout, kv: KvBlock, state: State, spec: AttentionSpec
    ) -> None:
        """Fold a block of keys into the state of q `[rows, heads, head_dim]`."""

    def score_tile(
        self, q: Array, k: Array, kv_head_of_q: NDArray[np.int32], scores: Array
    ) -> None:
        """Compute scores = q k^T, neither scaled nor masked: the first half of `attend_block`.

        q `[rows, heads, head_dim]`, k `[keys, kv_heads, head_dim]` with at most 512 keys, scores
        float32 `[rows, heads, keys]`. Slices of head_dim give scores that add up.
        """

    def fold_tile(
        self,
        scores: Array,
        q_start: int,
        k_start: int,
        v: Array,
        state: State,
        spec: AttentionSpec,
    ) -> None:
        """Fold scores of one key tile into the state of their rows: the second half.

        scores float32 `[rows, heads, keys]`, read-only, of consecutive rows and keys of one
        sequence from the global positions q_start and k_start on; v `[keys, kv_heads,
        v_head_dim]`. A key tile is 512 positions, at multiples of 512; keys are inside one. Tile
        by tile, `score_tile` and `fold_tile` give the bits of `attend_block`.
        """

    def merge(self, state: State, other: State) -> None:
        """Merge `other`, which saw other keys for the same rows, into `state`."""

    def finish(self, state: State, o: Array, lse: Array) -> None:
        """Normalise: o `[rows, heads, v_head_dim]` and lse float32 `[rows, heads]`."""

    def rope(
        self,
        x: Array,
        cos: Array,
        sin: Array,
        index: NDArray[np.int32],
        *,
        interleaved: bool = False,
    ) -> None:
        """Rotate x `[rows, heads, dim]` in place by rows `index` of cos, sin `[n, half]`.

        The first 2·half dimensions rotate, in pairs (i, i + half) or, interleaved, (2i, 2i + 1).
        """

    def norm(
        self,
        x: Array,
        weight: Array,
        bias: Array | None,
        out: Array,
        *,
        eps: float,
        kind: str,
        offset: float = 0.0,
        squares: Array | None = None,
        width: int = 0,
    ) -> None:
        """Normalise rows `[rows, d]`: RMSNorm ("rms") or LayerNorm ("layer").

        Gains are weight + offset, added in float32. With `squares`, float32 `[rows, 1]`, rows are
        parts of rows of `width` values, whose sums of squares are these ("rms" only).
        """

    def sum_squares(self, x: Array, out: Array) -> None:
        """Sum the squares of rows x `[rows, d]`: out float32 `[rows, 1]`."""

    def softcap(self, x: Array, cap: float) -> None:
        """Set x float32 `[rows, n]` to cap * tanh(x / cap), in place."""

    def gather_rows(
        self, source: Array, index: Array | NDArray[np.int32], out: Array, *, first_row: int = 0
    ) -> None:
        """Copy rows index - first_row of the source `[n, d]`; rows outside of it become zeros.

        This is an embedding lookup with a share of the vocabulary, or a dispatch to experts.
        """

    def select_experts(
        self,
        logits: Array,
        experts: Array,
        weights: Array,
        *,
        renormalize: bool,
        routing: Routing = DEFAULT_ROUTING,
        choice_bias: Array | None = None,
    ) -> int:
        """Choose experts of each row as `Routing` says; ties go to the lower id, or lower group.

        logits float32 `[rows, n]`, choice_bias float32 `[n]` if the routing has one; experts int32
        and weights float32 `[rows, k]` are filled by ascending id. `renormalize` makes a row's
        weights add up to 1 before they are scaled. Returns the first row whose logits are not
        finite, or -1.
        """

    def sort_rows(
        self, experts: Array, count: int, sources: Array, inverse: Array
    ) -> NDArray[np.int64]:
        """Sort the pairs (row, choice) of experts int32 `[rows, k]` by expert; the sort is stable.

        Pairs with expert -1 are left out. sources int32 `[rows * k]` receives the row of each pair
        in the new order, inverse int32 `[rows, k]` the index of each pair there, or -1. Returns
        the number of pairs of each of the `count` experts, on the host.
        """

    def count_experts(
        self, experts: Array, segment_rows: NDArray[np.int64], count: int
    ) -> NDArray[np.int64]:
        """Count the pairs of each expert in segments of consecutive rows: `[segments, count]`."""

    def drop_overflow(
        self,
        experts: Array,
        segment_rows: NDArray[np.int64],
        used: NDArray[np.int64],
        capacity: NDArray[np.int64],
    ) -> None:
        """Set experts int32 `[rows, k]` to -1, row by row, where a segment's expert is full.

        used `[segments, n]` is the used capacity, before and after; capacity `[segments]` is the
        capacity of each expert.
        """

    def combine_rows(
        self,
        rows: Array,
        inverse: Array,
        weights: Array,
        base: Array | None,
        out: Array,
        *,
        base_gate: Array | None = None,
    ) -> None:
        """Sum weights `[n, k]` times rows `[m, d]` at indices `inverse` `[n, k]`, by k; add base.

        An index of -1 adds nothing. out and base `[n, d]`, out may be base; rounded once. With
        `base_gate`, float32 `[n, 1]`, a row of base is multiplied by the sigmoid of its gate.
        """

    def copy(self, source: Array, out: Array) -> None:
        """Copy to an array of the same dtype, with any strides; repeat axes of length 1."""

    def add(self, a: Array, b: Array, out: Array) -> None:
        """Compute out = a + b."""

    def sum_partials(self, parts: Array, bias: Array | None, out: Array) -> None:
        """Sum parts `[p, rows, d]` in ascending p, add bias `[d]`, round once."""


Core = Any
"""The functions of `pympa._core` or `pympa._cuda`, or replacements that use only shapes."""
