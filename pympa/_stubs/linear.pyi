"""Packed weights and products with them."""

from pympa._stubs.execution import Array, Bytes, Execution, Int64

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
    limit: float,
    alpha: float,
    group_rows: Int64 | None,
    workspace: Bytes,
    on: Execution,
) -> None:
    """Compute out = round(act(x Wg^T + bg) * (x Wu^T + bu)).

    Or, with "swiglu_clamped", g = min(x Wg^T + bg, limit), u = x Wu^T + bu within ±limit, and
    out = round(g * sigmoid(alpha * g) * (u + 1)).

    Args:
        x: the inputs `[m, k]`.
        packed_gate: the packed `[n, k]` weight Wg; see `linear`.
        packed_up: the packed `[n, k]` weight Wu.
        out: an output `[m, n]`, see `linear`.
        bias_gate: the bias `[n]` of x's dtype.
        bias_up: the bias `[n]` of x's dtype.
        activation: one of the functions of `linear`, or "swiglu_clamped".
        limit: that of "swiglu_clamped", from 2^-126 to 1e30; without effect otherwise.
        alpha: that of "swiglu_clamped", from 2^-126 to 1e30; without effect otherwise.
        group_rows: the rows of each group, see `linear`.
        workspace: the workspace, see `linear_workspace_bytes`.
        on: the execution resource.
    """
