"""Routing of rows to experts, and the sum of what experts return."""

from pympa._stubs.execution import Array, Execution, Float32, Int32, Int64

def select_experts(
    logits: Float32,
    experts: Int32,
    weights: Float32,
    renormalize: bool,
    score: str,
    groups: int,
    top_groups: int,
    group_score: str,
    scale: float,
    choice_bias: Float32 | None,
    on: Execution,
) -> int:
    """Choose the experts of each row, those of the highest rank; ties go to the lower id.

    A rank is score + choice_bias, or the logit itself with score "softmax" and group_score
    "largest" and no choice_bias, since a softmax keeps the order of logits. A weight is
    score / sum * scale, with the sum over the row's choices if `renormalize`, otherwise 1. If it
    is a sum of sigmoids, 1e-20 is added to it.

    Args:
        logits: the logits `[rows, experts]`; at most 2048 experts, unless those with the largest
            logits are chosen.
        experts: an output `[rows, choices]` for the chosen ids, ascending.
        weights: an output `[rows, choices]` for their weights.
        renormalize: whether the scores are divided by their sum over the row's choices.
        score: the scores: "softmax" over all experts, or "sigmoid".
        groups: the number of groups of consecutive experts, a divisor of their number.
        top_groups: the number of groups that a row chooses from; ties go to the lower group.
        group_score: the rank of a group: the "largest" rank in it, or the sum of the two largest,
            "top2".
        scale: the factor on weights, from 2^-126 to 1e30.
        choice_bias: the numbers `[experts]` that are added to scores for the choice alone, or None.
        on: the execution resource.

    Returns:
        The first row with a logit that is not finite, or -1; the choice bias counts as part of
        each row. Such rows get the first ids, and weights of 0.
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
    base_gate: Float32 | None,
    out: Array,
    on: Execution,
) -> None:
    """Compute out[r] = round(sum over c of weights[r, c] * rows[inverse[r, c]], + base[r]).

    The sum is float32, from zero, by ascending c, with fused multiply-add if the ISA has it. With a
    gate, base[r] is multiplied by sigmoid(base_gate[r]) in float32.

    Args:
        rows: the experts' outputs `[sorted_rows, columns]`.
        inverse: the index of each pair in `rows`, `[rows, choices]`; -1 adds nothing.
        weights: the weight of each pair, `[rows, choices]`.
        base: the rows to add `[rows, columns]`, or None.
        base_gate: the gates of base `[rows, 1]`, or None.
        out: an output `[rows, columns]`; may be `base`.
        on: the execution resource.
    """
