"""Routing of rows to experts, and the sum of what experts return."""

from pympa._stubs.execution import Array, Execution, Float32, Int32, Int64

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
