"""Records of steps, measured or simulated, built from the same data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pympa.bench.experiment.rows import Row
from pympa.bench.records.record import Record, Spread, by_rank
from pympa.model.resources import RankStep
from pympa.plan.accounting import performed_flops, step_flops
from pympa.plan.mesh import Plan
from pympa.plan.rules import idle_ranks


def step_record(
    row: Row,
    plan: Plan,
    ranks: Sequence[RankStep],
    seconds: Spread,
    *,
    least_seconds: float,
    oversubscribed: bool = False,
    **others: Any,
) -> Record:
    """Return the record of a plan.

    Args:
        row: the row of the table.
        plan: the row's plan with the number of micro-batches of the run.
        ranks: the times and traffic of each rank in a step.
        seconds: the step seconds of the slowest rank.
        least_seconds: the least seconds that a step can take.
        oversubscribed: whether ranks share cores or GPUs, so that waiting times mean nothing.
        others: the other fields of the record.
    """
    spec, lengths = row.size.model, row.size.lengths
    tokens, flops = sum(lengths), step_flops(spec, lengths)
    times = [rank.times for rank in ranks]
    waits = [sum(of_rank.waits.values()) for of_rank in times]
    bubbles = [of_rank.waits.get("pp", 0.0) for of_rank in times]
    exposed = None if oversubscribed else max(waits) / seconds.median
    bubble = None if oversubscribed or plan.pp == 1 else max(bubbles) / seconds.median
    sent, read = (
        [getattr(rank.traffic, direction) for rank in ranks] for direction in ("sent", "read")
    )
    return Record(
        role=row.planned.role,
        plan=str(plan),
        ranks=plan.world,
        batch=row.size.batch,
        tokens=max(lengths),
        context=spec.context,
        tps=tokens / seconds.median,
        tpot_ms=1e3 * seconds.median / tokens,
        step_seconds=seconds,
        compute_seconds=by_rank([of_rank.compute for of_rank in times]),
        comm_seconds=by_rank(waits),
        hidden_seconds=by_rank([of_rank.hidden for of_rank in times]),
        overlap=times[waits.index(max(waits))].overlap,
        comm_fraction=exposed,
        bubble_fraction=bubble,
        bytes_sent=by_rank([counts.total() for counts in sent]),
        bytes_received=by_rank([rank.traffic.received.total() for rank in ranks]),
        bytes_sent_by_axis=_by_axis(sent),
        bytes_read=by_rank([counts.total() for counts in read]),
        bytes_read_by_axis=_by_axis(read),
        peak_bytes=by_rank([rank.peak_bytes for rank in ranks]),
        flops_per_token=flops / tokens,
        performed_flops=performed_flops(spec, plan, lengths) / flops,
        roofline_fraction=least_seconds / seconds.median,
        idle_ranks=idle_ranks(plan, lengths),
        oversubscribed=oversubscribed,
        exact=plan.exact,
        published_tps=row.planned.published_tps,
        published_tpot_ms=row.planned.published_tpot_ms,
        **others,
    )


def _by_axis(counts: Sequence[Counter[tuple[str, int]]]) -> dict[str, int]:
    """Add up the bytes of ranks by (axis, peer)."""
    total: Counter[str] = Counter()
    for of_rank in counts:
        for (axis, _), count in of_rank.items():
            total[axis] += count
    return dict(total)
