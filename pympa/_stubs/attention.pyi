"""Attention to blocks of keys, and the softmax state that it keeps."""

from pympa._stubs.execution import Array, Bytes, Execution, Float32, Int32, Int64

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

def start_state(
    row_max: Float32, row_sum: Float32, out: Float32, sinks: Array | None, on: Execution
) -> None:
    """Initialise a state; contiguous arrays.

    Without sinks it has seen no key: row_max = -inf, row_sum and out = 0. With sinks it has seen
    one key of that score, without a value: row_max = sink, row_sum = 1, out = 0. On a GPU, `out` of
    rows that have seen no key is neither written nor read.

    Args:
        row_max: an output `[rows, heads]`.
        row_sum: an output `[rows, heads]`.
        out: an output `[rows, heads, v_head_dim]`.
        sinks: the scores `[heads]`, of any dtype, or None.
        on: the execution resource.
    """

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
