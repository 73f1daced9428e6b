"""Kernels of pympa (C++ and CUDA, pybind11).

Rules for every function:

- `pympa._core` has the functions for CPUs and `pympa._cuda` those for GPUs, with the same
  arguments; `mlp` and the measurements of a core are only in `_core`. Arrays are NumPy arrays in
  `_core` and CuPy arrays in `_cuda`, but ranges, head maps, counts and `group_rows` are NumPy
  arrays in both. GPU kernels run later, in the order of their stream; functions that return a value
  or fill in counts wait for them.
- Arrays are of float32, float16 or `ml_dtypes.bfloat16` ("dtype" below) unless a
  type is given. Sums are float32; results are rounded to nearest, ties to even.
- Shapes are written `[rows, columns]`. The last dimension is contiguous; the other dimensions may
  be strided unless the text says otherwise.
- The caller allocates outputs and workspaces; a kernel allocates nothing. Workspaces are flat
  uint8 arrays with any contents, at least as long as the `*_workspace_bytes` function returns.
- `on` is the execution resource. Results have the same bits on every call with the same `isa`; they
  do not depend on `threads`, the number of OpenMP threads (1: no parallel region).
- The GIL is released while a kernel runs.
- A wrong shape, dtype, name, workspace or ISA raises ValueError: argument, expected, got.
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
    """Return what this machine runs, best first: avx512_bf16, avx512, avx2, portable; or cuda."""

class Execution:
    """The instruction set, threads or stream that kernels run on.

    Args:
        isa: one of `supported_isas()`.
        threads: the number of OpenMP threads of a call on a CPU.
        stream: the `cudaStream_t` of a GPU, as a number; 0 is its default stream.
    """

    def __init__(self, isa: str, *, threads: int = 1, stream: int = 0) -> None: ...

def packed_weight_bytes(n: int, k: int, dtype: str, on: Execution) -> int:
    """Return the bytes of a packed `[n, k]` weight."""

def pack_weight(weight: Array, packed: Bytes, on: Execution) -> None:
    """Copy a weight into the panels that `linear` reads, without changing its dtype.

    Args:
        weight: the weight `[n, k]`, row-major.
        packed: an output of at least `packed_weight_bytes(n, k, dtype, on)` bytes, for this ISA
            only; fastest if aligned to 64 bytes.
        on: the execution resource.
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

    Each element is the ascending sum of float32 partials over k-blocks of 512, each started at
    zero. Its bits depend only on its row of x, its row of W and the ISA.

    Args:
        x: the inputs `[m, k]`.
        packed: the packed `[n, k]` weight of x's dtype; `[groups, bytes]` with `group_rows`.
        out: an output `[m, n]` of x's dtype, or float32 (then nothing is rounded); may be
            `residual`.
        bias: the bias `[n]` of x's dtype; `[groups, n]` with `group_rows`.
        activation: the function: "none", "gelu" (erf), "gelu_tanh" or "silu".
        residual: the residual `[m, n]` of out's dtype.
        branch: an output `[m, n]` of out's dtype for b.
        group_rows: the numbers `[groups]` of consecutive rows with their own weight and bias,
            adding up to m; or None.
        workspace: the workspace, see `linear_workspace_bytes`.
        on: the execution resource.
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
    """Return the workspace bytes of `mlp`, which do not depend on the number of rows."""

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
    """Compute `linear`, or `gated_linear`, and a second `linear`, with the bits of both calls.

    Only parts of `[item_rows, 512]` of the hidden state exist at a time.

    Args:
        x: the inputs `[m, k]`.
        packed_gate: the packed `[hidden, k]` weight of a gated MLP, or None.
        packed_up: the packed `[hidden, k]` weight.
        packed_down: the packed `[n, hidden]` weight.
        out: an output `[m, n]` of x's dtype, or float32; may be `residual` or x.
        bias_gate: the bias `[hidden]` of x's dtype.
        bias_up: the bias `[hidden]` of x's dtype.
        bias: the bias `[n]` of x's dtype.
        activation: the function, see `linear`.
        hidden: the number of columns of the hidden state.
        residual: the residual, see `linear`.
        branch: an output, see `linear`.
        group_rows: the rows of each group, see `linear`; weights are then `[groups, bytes]`, biases
            `[groups, columns]`.
        item_rows: the number of rows for which one thread reads the weights once; it changes memory
            and speed.
        workspace: the workspace, see `mlp_workspace_bytes`.
        on: the execution resource.
    """

def attention_workspace_bytes(head_dim: int, v_head_dim: int, dtype: str, on: Execution) -> int:
    """Return the workspace bytes of `attend_block`, which do not depend on the number of tokens.

    Also those of `score_tile`, with a v_head_dim of 0, and of `fold_tile`, with a head_dim of 0.
    """

def range_workspace_bytes(
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    dtype: str,
    q_ranges: Int64,
    k_ranges: Int64,
    decode: bool,
    on: Execution,
) -> int:
    """Return the workspace bytes of `attend_block` for its ranges, in addition to the fixed ones.

    On a GPU they hold partial states if `decode` is true. On a CPU they hold a copy of a key tile
    for each thread, if ranges adjoin inside a tile and their rows are not consecutive.
    """

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

    A key tile is 512 positions of the sequence, at multiples of 512. For each tile, scores are
    multiplied by `scale`, capped and masked; row_max is updated; probabilities exp(s - row_max) are
    rounded to the dtype and summed as rounded; out is rescaled, and the tile's partial is added. A
    row's bits depend on the row, on the keys that it sees, and on the positions inside a tile at
    which a call ends a range (ends at multiples of 512 change nothing). They do not depend on other
    rows, later keys or threads, even if other rows or later keys have NaN or infinity. K ranges are
    folded in their order.

    Args:
        q: the queries `[rows, heads, head_dim]`.
        k: the keys `[keys, kv_heads, head_dim]` of q's dtype; `keys` may be 0. On a GPU head_dim is
            at most 576 and v_head_dim at most 512.
        v: the values `[keys, kv_heads, v_head_dim]` of q's dtype.
        q_ranges: the ranges `[n, 3]` of queries (sequence, global start, length); rows are packed
            in range order.
        k_ranges: the ranges `[n, 4]` of keys (sequence, global start, length, first row); queries
            see only keys of their own sequence. Consecutive ranges that adjoin count as one.
        row_max: the running maximum `[rows, heads]`, -inf at first (natural logarithm).
        row_sum: the running sum `[rows, heads]`, 0 at first.
        out: the running output `[rows, heads, v_head_dim]`, 0 at first; not normalised.
        kv_head_of_q: the kv head of each query head, `[heads]`.
        scale: the factor on q.k: 0, or from 2^-126 to 1e30, or its negative.
        causal: whether key j is visible to query i only if j <= i.
        window: the window: only keys with i - j < window and j - i < window are visible; 0 for
            none.
        softcap: the cap in softcap * tanh(score / softcap) on scores, 2^-126 to 1e5; 0 for none.
        decode: whether few rows attend to many keys. On a GPU, splits of 512 positions are then
            attended separately and merged in ascending order, with other bits; on a CPU it changes
            nothing.
        workspace: the workspace, see `attention_workspace_bytes` and `range_workspace_bytes`.
        on: the execution resource.
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

    Each score is one float32 sum over head_dim, started at zero, with the bits of `attend_block`.

    Args:
        q: the queries `[rows, heads, head_dim]`; `rows` may be 0.
        k: the keys `[keys, kv_heads, head_dim]` of q's dtype; `keys` from 0 to 512.
        kv_head_of_q: the kv head of each query head, `[heads]`.
        scores: an output `[rows, heads, keys]`.
        workspace: the workspace, see `attention_workspace_bytes`.
        on: the execution resource.
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

    Rows and keys are consecutive positions of one sequence, and the keys are within one key tile.
    If `score_tile` and `fold_tile` process the tiles of an `attend_block` in its order, the state
    gets the same bits. Rows that see none of the keys do not change.

    Args:
        scores: the scores `[rows, heads, keys]`, read-only.
        v: the values `[keys, kv_heads, v_head_dim]`; probabilities are rounded to their dtype.
        kv_head_of_q: the kv head of each query head, `[heads]`.
        q_start: the global position of the first row.
        k_start: the global position of the first key.
        row_max: the running maximum `[rows, heads]`.
        row_sum: the running sum `[rows, heads]`.
        out: the running output `[rows, heads, v_head_dim]`.
        scale: the factor on the scores, see `attend_block`.
        causal: whether keys after the query are hidden.
        window: the window, see `attend_block`; 0 for none.
        softcap: the cap on scores, see `attend_block`; 0 for none.
        workspace: the workspace, see `attention_workspace_bytes`.
        on: the execution resource.
    """

def start_state(row_max: Float32, row_sum: Float32, out: Float32, on: Execution) -> None:
    """Initialise a state without keys: row_max = -inf, row_sum and out = 0; contiguous arrays."""

def merge(
    row_max: Float32,
    row_sum: Float32,
    out: Float32,
    other_row_max: Float32,
    other_row_sum: Float32,
    other_out: Float32,
    on: Execution,
) -> None:
    """Merge another state of the same rows into the first; contiguous arrays; -inf is allowed."""

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
        row_max: the running maximum `[rows, heads]`.
        row_sum: the running sum `[rows, heads]`.
        out: the running output `[rows, heads, v_head_dim]`.
        o: an output `[rows, heads, v_head_dim]` of any dtype; 0 for rows without visible keys.
        lse: an output `[rows, heads]`; -inf for rows without visible keys.
        on: the execution resource.
    """

def rope(x: Array, cos: Float32, sin: Float32, index: Int32, on: Execution) -> None:
    """Rotate pairs (i, i + half) of the first 2 * half dims in place; rounds once.

    Args:
        x: the rows `[rows, heads, head_dim]`.
        cos: the table of cosines `[positions, half]`.
        sin: the table of sines `[positions, half]`.
        index: the row of the tables for each row of x, `[rows]`.
        on: the execution resource.
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
        x: the rows `[rows, columns]`.
        weight: the gain `[columns]`.
        bias: the bias `[columns]`, or None.
        eps: the number added to the mean square: 0, or from 2^-126 to 1e30.
        kind: the norm: "rms" or "layer".
        out: an output `[rows, columns]`; may be `x`.
        on: the execution resource.
    """

def gather_rows(source: Array, index: Int32, out: Array, first_row: int, on: Execution) -> None:
    """Copy out[r] = source[index[r] - first_row]; zeros if the source has no such row.

    Args:
        source: the table `[source_rows, columns]`, or a share of one from `first_row` on.
        index: the row of the table for each row, `[rows]`.
        out: an output `[rows, columns]`.
        first_row: the index of the source's first row.
        on: the execution resource.
    """

def select_experts(
    logits: Float32, experts: Int32, weights: Float32, renormalize: bool, on: Execution
) -> int:
    """Choose the experts of each row: softmax, then its largest entries; ties go to the lower id.

    Args:
        logits: the logits `[rows, experts]`.
        experts: an output `[rows, choices]` for the chosen ids, ascending.
        weights: an output `[rows, choices]` for their probabilities.
        renormalize: whether the probabilities are divided by their sum over the row's choices.
        on: the execution resource.

    Returns:
        The first row with a logit that is not finite, or -1. Such rows get the first ids, and
        weights of 0.
    """

def sort_rows(experts: Int32, counts: Int64, sources: Int32, inverse: Int32, on: Execution) -> None:
    """Sort all pairs (row, choice) by expert; the sort is stable.

    Args:
        experts: the expert of each pair, `[rows, choices]`; pairs of -1 are left out.
        counts: an output `[experts]` for the number of pairs of each expert.
        sources: an output `[rows * choices]` for the row of each pair in the new order; elements
            after the last pair are not written.
        inverse: an output `[rows, choices]` for each pair's index in the new order, or -1.
        on: the execution resource.
    """

def count_experts(experts: Int32, segment_rows: Int64, counts: Int64, on: Execution) -> None:
    """Count the pairs (row, choice) of each expert in each segment of consecutive rows.

    Args:
        experts: the expert of each pair, `[rows, choices]`; pairs of -1 are not counted.
        segment_rows: the number of rows of each segment, `[segments]`, adding up to `rows`.
        counts: an output `[segments, experts]`.
        on: the execution resource.
    """

def drop_overflow(
    experts: Int32, segment_rows: Int64, used: Int64, capacity: Int64, on: Execution
) -> None:
    """Drop (-1) each pair (row, choice), row by row, whose expert is full in its segment.

    Args:
        experts: the expert of each pair, `[rows, choices]`, in place; pairs of -1 use no capacity.
        segment_rows: the number of rows of each segment, `[segments]`, adding up to `rows`.
        used: the used capacity `[segments, experts]`, in place.
        capacity: the capacity of each expert, `[segments]`.
        on: the execution resource.
    """

def combine_rows(
    rows: Array,
    inverse: Int32,
    weights: Float32,
    base: Array | None,
    out: Array,
    on: Execution,
) -> None:
    """Compute out[r] = round(sum over c of weights[r, c] * rows[inverse[r, c]], + base[r]).

    The sum is float32, from zero, by ascending c, with fused multiply-add if the ISA has it.

    Args:
        rows: the experts' outputs `[sorted_rows, columns]`.
        inverse: the index of each pair in `rows`, `[rows, choices]`; -1 adds nothing.
        weights: the weight of each pair, `[rows, choices]`.
        base: the rows to add `[rows, columns]`, or None.
        out: an output `[rows, columns]`; may be `base`.
        on: the execution resource.
    """

def add(a: Array, b: Array, out: Array, on: Execution) -> None:
    """Compute out = round(a + b), all `[rows, columns]`; out may be a or b."""

def sum_partials(parts: Array, bias: Array | None, out: Array, on: Execution) -> None:
    """Compute out = round(parts[0] + parts[1] + ... + bias) in float32, in that order.

    Args:
        parts: the partials `[parts, rows, columns]`.
        bias: the bias `[columns]`, or None.
        out: an output `[rows, columns]`; may be one of the parts.
        on: the execution resource.
    """

def fma_peak(dtype: str, isa: str, seconds: float) -> float:
    """Measure the flop/s of one core on multiply-adds in registers, as in products of a dtype."""

def read_bandwidth(bytes: int, seconds: float, tries: int) -> float:
    """Measure the bytes/s of one core over a buffer of `bytes` bytes: the best of some tries."""
