"""Kernels of pympa (C++ and CUDA, pybind11).

Rules that hold for every function:

- `pympa._core` has them for CPUs, `pympa._cuda` for GPUs, with the same arguments; `mlp` and the
  measurements of a core are only in the former. Arrays are NumPy arrays in the one and CuPy arrays
  in the other, but ranges, head maps, counts and `group_rows` are NumPy arrays in both. GPU kernels
  run later, in the order of their stream; those that return a value or fill in counts wait for it.
- Arrays are of float32, float16 or `ml_dtypes.bfloat16` ("dtype" below) unless a
  type is given. Sums are float32; results are rounded to nearest, ties to even.
- Shapes are written `[rows, columns]`. The last dimension is contiguous; outer ones may be
  strided unless said otherwise.
- Outputs and workspaces belong to the caller; a kernel allocates nothing. Workspaces are flat
  uint8 arrays, at least as long as the `*_workspace_bytes` function says, contents arbitrary.
- `on` says what a call runs on. Bits are the same on every call with the same `isa` of it; they do
  not depend on its `threads`, the number of OpenMP threads (1: no parallel region).
- The GIL is released while a kernel runs.
- A wrong shape, dtype, name, workspace or ISA raises ValueError with argument, expected, got.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Bytes: TypeAlias = NDArray[np.uint8]
Float32: TypeAlias = NDArray[np.float32]
Int32: TypeAlias = NDArray[np.int32]
Int64: TypeAlias = NDArray[np.int64]

def supported_isas() -> list[str]:
    """Name what this machine runs, best first: avx512_bf16, avx512, avx2, portable; or cuda."""

class Execution:
    """What kernels run on.

    Args:
        isa: one of `supported_isas()`.
        threads: OpenMP threads of a call on a CPU.
        stream: `cudaStream_t` of a GPU, as a number; 0 is its default stream.
    """

    def __init__(self, isa: str, *, threads: int = 1, stream: int = 0) -> None: ...

def packed_weight_bytes(n: int, k: int, dtype: str, on: Execution) -> int:
    """Return the bytes of a packed `[n, k]` weight."""

def pack_weight(weight: Array, packed: Bytes, on: Execution) -> None:
    """Copy a weight into the panels that `linear` reads; the dtype stays.

    Args:
        weight: `[n, k]`, row-major.
        packed: at least `packed_weight_bytes(n, k, dtype, on)` bytes; good for this ISA only;
            fastest if aligned to 64 bytes.
        on: what it runs on.
    """

def linear_workspace_bytes(m: int, n: int, k: int, dtype: str, gated: bool, on: Execution) -> int:
    """Return the workspace bytes of `linear`, or of `gated_linear` if `gated`."""

def linear(
    x: Array,
    packed: Bytes,
    out: Array,
    bias: Array | None,
    activation: str,
    residual: Array | None,
    branch: Array | None,
    group_rows: Int64 | None,
    workspace: Bytes,
    on: Execution,
) -> None:
    """Compute y = act(x W^T + bias), b = round(y), out = round(residual + b), or b.

    Each element is the ascending sum of zero-started float32 partials over k-blocks of 512: its
    bits depend on its row of x, its row of W and the ISA alone.

    Args:
        x: `[m, k]`.
        packed: the packed `[n, k]` weight of x's dtype; `[groups, bytes]` with `group_rows`.
        out: `[m, n]` of x's dtype, or float32 (then nothing is rounded); may be `residual`.
        bias: `[n]` of x's dtype; `[groups, n]` with `group_rows`.
        activation: "none", "gelu" (erf), "gelu_tanh" or "silu".
        residual: `[m, n]` of out's dtype.
        branch: `[m, n]` of out's dtype; receives b.
        group_rows: `[groups]`, adding up to m, or None: consecutive rows that have a weight and a
            bias of their own.
        workspace: see `linear_workspace_bytes`.
        on: what it runs on.
    """

def gated_linear(
    x: Array,
    packed_gate: Bytes,
    packed_up: Bytes,
    out: Array,
    bias_gate: Array | None,
    bias_up: Array | None,
    activation: str,
    group_rows: Int64 | None,
    workspace: Bytes,
    on: Execution,
) -> None:
    """Compute out = round(act(x Wg^T + bg) * (x Wu^T + bu)); arguments as for `linear`."""

def mlp_workspace_bytes(item_rows: int, hidden: int, n: int, gated: bool, on: Execution) -> int:
    """Return the workspace bytes of `mlp`, whatever the number of rows."""

def mlp(
    x: Array,
    packed_gate: Bytes | None,
    packed_up: Bytes,
    packed_down: Bytes,
    out: Array,
    bias_gate: Array | None,
    bias_up: Array | None,
    bias: Array | None,
    activation: str,
    hidden: int,
    residual: Array | None,
    branch: Array | None,
    group_rows: Int64 | None,
    item_rows: int,
    workspace: Bytes,
    on: Execution,
) -> None:
    """Compute `linear`, or `gated_linear`, and the `linear` after it, with their bits.

    The hidden state between exists in parts of `[item_rows, 512]` only.

    Args:
        x: `[m, k]`.
        packed_gate: the packed `[hidden, k]` weight of a gated MLP, or None.
        packed_up: the packed `[hidden, k]` weight.
        packed_down: the packed `[n, hidden]` weight.
        out: `[m, n]` of x's dtype, or float32; may be `residual` or x.
        bias_gate: `[hidden]` of x's dtype.
        bias_up: `[hidden]` of x's dtype.
        bias: `[n]` of x's dtype.
        activation: see `linear`.
        hidden: columns of the hidden state.
        residual: see `linear`.
        branch: see `linear`.
        group_rows: see `linear`; weights are then `[groups, bytes]`, biases `[groups, columns]`.
        item_rows: rows that share a pass over the weights on one thread; changes memory and speed.
        workspace: see `mlp_workspace_bytes`.
        on: what it runs on.
    """

def attention_workspace_bytes(head_dim: int, v_head_dim: int, dtype: str, on: Execution) -> int:
    """Return the workspace bytes of `attend_block`: fixed, whatever the number of tokens.

    Also those of `score_tile`, with a v_head_dim of 0, and of `fold_tile`, with a head_dim of 0.
    """

def decode_workspace_bytes(
    v_head_dim: int, heads: int, q_ranges: Int64, k_ranges: Int64, on: Execution
) -> int:
    """Return the workspace bytes of `attend_block` beside those where it decodes."""

def attend_block(
    q: Array,
    k: Array,
    v: Array,
    q_ranges: Int64,
    k_ranges: Int64,
    row_max: Float32,
    row_sum: Float32,
    out: Float32,
    kv_head_of_q: Int32,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    decode: bool,
    workspace: Bytes,
    on: Execution,
) -> None:
    """Fold a block of keys into the running softmax state of each query row, in place.

    A key tile is 512 positions of the sequence, at multiples of 512. Within a tile: scores, times
    `scale`, capped, masked; row_max moves; probabilities exp(s - row_max) are rounded to the dtype
    and summed as rounded; out is rescaled and takes the tile's partial. A row's bits depend on the
    row, on the keys that it sees and on where the k ranges are cut (cuts at multiples of 512
    change nothing), not on other rows, later keys or threads, NaN and infinity in these included.
    K ranges are folded in their order.

    Args:
        q: `[rows, heads, head_dim]`.
        k: `[keys, kv_heads, head_dim]` of q's dtype; `keys` may be 0.
        v: `[keys, kv_heads, v_head_dim]` of q's dtype.
        q_ranges: `[n, 3]` (sequence, global start, length); rows are packed in range order.
        k_ranges: `[n, 3]` likewise for keys; queries see keys of their own sequence only.
        row_max: `[rows, heads]`, -inf at first (natural logarithm).
        row_sum: `[rows, heads]`, 0 at first.
        out: `[rows, heads, v_head_dim]`, 0 at first; not normalised.
        kv_head_of_q: `[heads]`, the K/V head of each query head.
        scale: factor on q.k: 0, or from 2^-126 to 1e30, or its negative.
        causal: key j is visible to query i only if j <= i.
        window: 0 for none; else only if i - j < window and j - i < window.
        softcap: 0 for none; else scores become softcap * tanh(score / softcap); 2^-126 to 1e5.
        decode: few rows meet many keys. On a GPU splits of 512 positions are then attended apart
            and merged in ascending order, with bits of their own; on a CPU it changes nothing.
        workspace: see `attention_workspace_bytes`.
        on: what it runs on.
    """

def score_tile(
    q: Array,
    k: Array,
    kv_head_of_q: Int32,
    scores: Float32,
    workspace: Bytes,
    on: Execution,
) -> None:
    """Compute scores = q k^T, neither scaled nor masked: the first half of `attend_block`.

    Each score is one zero-started float32 sum over head_dim, with the bits of `attend_block`.

    Args:
        q: `[rows, heads, head_dim]`; `rows` may be 0.
        k: `[keys, kv_heads, head_dim]` of q's dtype; `keys` from 0 to 512.
        kv_head_of_q: `[heads]`, the K/V head of each query head.
        scores: `[rows, heads, keys]`.
        workspace: see `attention_workspace_bytes`.
        on: what it runs on.
    """

def fold_tile(
    scores: Float32,
    v: Array,
    kv_head_of_q: Int32,
    q_start: int,
    k_start: int,
    row_max: Float32,
    row_sum: Float32,
    out: Float32,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    workspace: Bytes,
    on: Execution,
) -> None:
    """Fold scores into the running softmax state, in place: the second half of `attend_block`.

    Rows and keys are consecutive positions of one sequence, the keys within one key tile. On what
    `score_tile` makes of the tiles that `attend_block` would meet, in its order, the state gets
    the bits that `attend_block` gives it. Rows that see none of the keys stay as they are.

    Args:
        scores: `[rows, heads, keys]`, only read.
        v: `[keys, kv_heads, v_head_dim]`, whose dtype probabilities are rounded to.
        kv_head_of_q: `[heads]`, the K/V head of each query head.
        q_start: global position of the first row.
        k_start: global position of the first key.
        row_max: `[rows, heads]`.
        row_sum: `[rows, heads]`.
        out: `[rows, heads, v_head_dim]`.
        scale: factor on the scores; masks and cap: see `attend_block`.
        causal: hide keys after the query.
        window: 0 for none.
        softcap: 0 for none.
        workspace: see `attention_workspace_bytes`.
        on: what it runs on.
    """

def start_state(row_max: Float32, row_sum: Float32, out: Float32, on: Execution) -> None:
    """Make a state that has seen no key: row_max = -inf, the rest 0; contiguous arrays."""

def merge(
    row_max: Float32,
    row_sum: Float32,
    out: Float32,
    other_row_max: Float32,
    other_row_sum: Float32,
    other_out: Float32,
    on: Execution,
) -> None:
    """Fold another state of the same rows into the first; contiguous arrays, -inf safe."""

def finish(
    row_max: Float32,
    row_sum: Float32,
    out: Float32,
    o: Array,
    lse: Float32,
    on: Execution,
) -> None:
    """Compute o = round(out / row_sum) and lse = row_max + ln(row_sum); contiguous arrays.

    Args:
        row_max: `[rows, heads]`.
        row_sum: `[rows, heads]`.
        out: `[rows, heads, v_head_dim]`.
        o: `[rows, heads, v_head_dim]` of any dtype; 0 for rows that saw no key.
        lse: `[rows, heads]`; -inf for rows that saw no key.
        on: what it runs on.
    """

def rope(x: Array, cos: Float32, sin: Float32, index: Int32, on: Execution) -> None:
    """Rotate pairs (i, i + half) of the first 2 * half dims in place; rounds once.

    Args:
        x: `[rows, heads, head_dim]`.
        cos: `[positions, half]`.
        sin: `[positions, half]`.
        index: `[rows]`, the row of the tables for each row of x.
        on: what it runs on.
    """

def norm(
    x: Array,
    weight: Array,
    bias: Array | None,
    eps: float,
    kind: str,
    out: Array,
    on: Execution,
) -> None:
    """Normalise the rows of x `[rows, columns]`: "rms" or "layer" (two passes); rounds once.

    Args:
        x: `[rows, columns]`.
        weight: `[columns]`.
        bias: `[columns]`.
        eps: added to the mean square: 0, or from 2^-126 to 1e30.
        kind: "rms" or "layer".
        out: `[rows, columns]`; may be `x`.
        on: what it runs on.
    """

def gather_rows(source: Array, index: Int32, out: Array, first_row: int, on: Execution) -> None:
    """Copy out[r] = source[index[r] - first_row]; zeros where that is no row of the source.

    Args:
        source: `[source_rows, columns]`, a table (or a share of one) from `first_row` on.
        index: `[rows]`.
        out: `[rows, columns]`.
        first_row: index of the source's first row.
        on: what it runs on.
    """

def select_experts(
    logits: Float32, experts: Int32, weights: Float32, renormalize: bool, on: Execution
) -> int:
    """Choose the experts of each row: softmax, then its largest entries, ties to the lower id.

    Args:
        logits: `[rows, experts]`.
        experts: `[rows, choices]`; receives the chosen ids, ascending.
        weights: `[rows, choices]`; receives their probabilities.
        renormalize: divide the probabilities by their sum over the row's choices.
        on: what it runs on.

    Returns:
        The first row with a logit that is not finite, or -1. Such rows get the first ids, and
        weights of 0.
    """

def sort_rows(experts: Int32, counts: Int64, sources: Int32, places: Int32, on: Execution) -> None:
    """Sort all pairs (row, choice) by expert, stably.

    Args:
        experts: `[rows, choices]`; -1 leaves a pair out.
        counts: `[experts]`; receives the pairs of each expert.
        sources: `[rows * choices]`; receives the row of each pair in the new order, and nothing
            after the last.
        places: `[rows, choices]`; receives each pair's index in the new order, or -1.
        on: what it runs on.
    """

def count_experts(experts: Int32, segment_rows: Int64, counts: Int64, on: Execution) -> None:
    """Count the pairs (row, choice) of each expert in each segment of consecutive rows.

    Args:
        experts: `[rows, choices]`; -1 counts nowhere.
        segment_rows: `[segments]`, adding up to `rows`.
        counts: `[segments, experts]`; receives the counts.
        on: what it runs on.
    """

def drop_overflow(
    experts: Int32, segment_rows: Int64, used: Int64, capacity: Int64, on: Execution
) -> None:
    """Drop (-1) each pair (row, choice), row by row, whose expert is full in its segment.

    Args:
        experts: `[rows, choices]`, in place; -1 takes no room.
        segment_rows: `[segments]`, adding up to `rows`.
        used: `[segments, experts]`, in place: room taken so far.
        capacity: `[segments]`: room of each expert.
        on: what it runs on.
    """

def combine_rows(
    rows: Array,
    places: Int32,
    weights: Float32,
    base: Array | None,
    out: Array,
    on: Execution,
) -> None:
    """Compute out[r] = round(sum over c of weights[r, c] * rows[places[r, c]], + base[r]).

    The sum is float32, from zero, by ascending c, fused where the ISA can.

    Args:
        rows: `[sorted_rows, columns]`.
        places: `[rows, choices]`; -1 adds nothing.
        weights: `[rows, choices]`.
        base: `[rows, columns]`.
        out: `[rows, columns]`; may be `base`.
        on: what it runs on.
    """

def add(a: Array, b: Array, out: Array, on: Execution) -> None:
    """Compute out = round(a + b), all `[rows, columns]`; out may be a or b."""

def sum_partials(parts: Array, bias: Array | None, out: Array, on: Execution) -> None:
    """Compute out = round(parts[0] + parts[1] + ... + bias) in float32, in that order.

    Args:
        parts: `[parts, rows, columns]`.
        bias: `[columns]`.
        out: `[rows, columns]`; may be one of the parts.
        on: what it runs on.
    """

def fma_peak(dtype: str, isa: str, seconds: float) -> float:
    """Measure the flop/s of one core on register-only multiply-adds as products of dtype use."""

def read_bandwidth(bytes: int, seconds: float, tries: int) -> float:
    """Measure the bytes/s of one core over a buffer of `bytes` bytes: the best of some tries."""
