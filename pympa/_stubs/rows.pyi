"""Kernels that work row by row."""

from pympa._stubs.execution import Array, Execution, Float32, Int32

def rope(
    x: Array, cos: Float32, sin: Float32, index: Int32, interleaved: bool, on: Execution
) -> None:
    """Rotate pairs of the first 2 * half dimensions in place; rounds once.

    Args:
        x: the rows `[rows, heads, head_dim]`.
        cos: the table of cosines `[positions, half]`.
        sin: the table of sines `[positions, half]`.
        index: the row of the tables for each row of x, `[rows]`.
        interleaved: whether the pairs are (2i, 2i + 1), otherwise (i, i + half).
        on: the execution resource.
    """

def norm(
    x: Array,
    weight: Array,
    bias: Array | None,
    eps: float,
    kind: str,
    offset: float,
    squares: Float32 | None,
    width: int,
    out: Array,
    on: Execution,
) -> None:
    """Normalise the rows of x `[rows, columns]`: "rms" or "layer" (two passes); rounds once.

    Gains are weight + offset, added in float32.

    Args:
        x: the rows `[rows, columns]`.
        weight: the gain less `offset`, `[columns]`.
        bias: the bias `[columns]`, or None.
        eps: the number added to the mean square: 0, or from 2^-126 to 1e30.
        kind: the norm: "rms" or "layer".
        offset: the number added to the weight: 0, or from 2^-126 to 1e30, or its negative.
        squares: the sums of squares `[rows, 1]` of rows of which x has a part ("rms" only), or
            None if x has whole rows.
        width: the number of values of such a row, at least `columns`; without effect if `squares`
            is None.
        out: an output `[rows, columns]`; may be `x`.
        on: the execution resource.
    """

def sum_squares(x: Array, out: Float32, on: Execution) -> None:
    """Compute out[r] = sum of x[r]^2 in float32, as `norm` does for "rms".

    Args:
        x: the rows `[rows, columns]`.
        out: an output `[rows, 1]`.
        on: the execution resource.
    """

def softcap(x: Float32, cap: float, on: Execution) -> None:
    """Compute x = cap * tanh(x / cap) in place.

    Args:
        x: the rows `[rows, columns]`.
        cap: the cap, 2^-126 to 1e5.
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
