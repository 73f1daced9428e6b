"""What a prediction looks like: a record with `clock="simulated"`, and a table."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence

from pympa.accounting import performed_flops, step_flops
from pympa.bench.predict import Prediction, SimulatedRow
from pympa.bench.record import Record, Simulation, by_rank, environment, spread
from pympa.bench.table import plan_cell
from pympa.bench.text_table import Table
from pympa.cluster import Cluster
from pympa.kernels.cpu import supported_isas
from pympa.rules import idle_ranks, told_idle


def simulated_record(
    experiment: str,
    options: argparse.Namespace,
    row: SimulatedRow,
    found: Prediction,
    dtype: str,
    cluster: Cluster,
) -> Record:
    """Return the record of a prediction.

    Args:
        experiment: its name.
        options: of the command line.
        row: of the table.
        found: the prediction of it.
        dtype: of weights and activations.
        cluster: that it is of.
    """
    spec, lengths = row.size.model, row.size.lengths
    flops, tokens = step_flops(spec, lengths), sum(lengths)
    times = [rank.times for rank in found.ranks]
    waits = [sum(t.waits.values()) for t in times]
    by_axis: Counter[str] = Counter()
    for rank in found.ranks:
        for (axis, _), count in rank.sent.items():
            by_axis[axis] += count
    bubbles = [t.waits.get("pp", 0.0) for t in times]
    least = flops / (cluster.device.flops_per_second[dtype] * found.plan.world)
    return Record(
        experiment=experiment,
        role=row.planned.role,
        plan=str(found.plan),
        ranks=found.plan.world,
        backend="virtual",
        clock="simulated",
        dtype=dtype,
        size=options.size,
        batch=row.size.batch,
        tokens=max(lengths),
        tps=tokens / found.step_seconds,
        tpot_ms=1e3 * found.step_seconds / tokens,
        step_seconds=spread([found.step_seconds]),
        compute_seconds=by_rank([t.compute for t in times]),
        comm_seconds=by_rank(waits),
        hidden_seconds=by_rank([t.hidden for t in times]),
        overlap=max(times, key=lambda t: sum(t.waits.values())).overlap,
        comm_fraction=max(waits) / found.step_seconds,
        bubble_fraction=max(bubbles) / found.step_seconds if found.plan.pp > 1 else None,
        bytes_sent=by_rank([rank.sent.total() for rank in found.ranks]),
        bytes_received=by_rank([rank.received.total() for rank in found.ranks]),
        bytes_sent_by_axis=dict(by_axis),
        peak_bytes=by_rank([rank.peak_bytes for rank in found.ranks]),
        process_peak_bytes=None,
        flops_per_token=flops / tokens,
        performed_flops=performed_flops(spec, found.plan, lengths) / flops,
        roofline_fraction=least / found.step_seconds,
        idle_ranks=idle_ranks(found.plan, lengths),
        oversubscribed=False,
        error=None,
        tolerance=None,
        error_of=None,
        error_one_rank=None,
        sampled_rows=None,
        verified=False,
        exact=found.plan.exact,
        searched={},
        published_tps=row.planned.published_tps,
        published_tpot_ms=row.planned.published_tpot_ms,
        simulation=Simulation(
            cluster.title,
            list(options.slow or []),
            found.joules / tokens,
            *found.layers,
            found.transport_calls,
        ),
        environment=environment(cores=1, isa=supported_isas()[0], threads=1, mpi="none"),
    )


def simulated_table(
    title: str,
    dtype: str,
    cluster: Cluster,
    rows: Sequence[tuple[SimulatedRow, Prediction]],
    notes: Sequence[str] = (),
) -> Table:
    """Return published, simulated and physically possible speeds side by side.

    Args:
        title: of the table.
        dtype: of weights and activations.
        cluster: that the predictions are of.
        rows: and their predictions.
        notes: lines for the caption.
    """
    ran, passes = (sum(found.layers[i] for _, found in rows) for i in (0, 1))
    caption = [
        "possible: useful flops at the data sheet's peak of all its ranks; waiting: of the rank "
        "that waits most; mJ: board power × time in kernels",
        f"of {passes:,} passes of a rank through layers {ran:,} were simulated, the others were "
        "like these",
        *(told_idle(found.plan, idle) for row, found in rows if (idle := _idle(row, found))),
        *notes,
    ]
    table = Table(title, caption)
    table.add_column("plan", text=True)
    for heading in (
        "ranks",
        "published\ntps",
        "simulated\ntps",
        "possible\ntps",
        "published\nratio",
        "simulated\nratio",
        "simulated\nwaiting",
        "GB sent",
        "peak GB\nper rank",
        "fits",
        "simulated\nmJ / token",
    ):
        table.add_column(heading)
    base = next((pair for pair in rows if pair[0].planned.role == "baseline"), rows[0])
    for row, found in rows:
        tokens, flops = sum(row.size.lengths), step_flops(row.size.model, row.size.lengths)
        possible = tokens * cluster.device.flops_per_second[dtype] * found.plan.world / flops
        published, of_base = row.planned.published_tps, base[0].planned.published_tps
        table.add_row(
            [*plan_cell(str(found.plan)), row.planned.role],
            str(found.plan.world),
            "-" if published is None else f"{published:,.0f}",
            f"{tokens / found.step_seconds:,.0f}",
            f"{possible:,.0f}",
            "-" if published is None or of_base is None else f"{published / of_base:.2f}",
            f"{_flops_per_second(row, found) / _flops_per_second(*base):.2f}",
            f"{found.waiting_seconds / found.step_seconds:.0%}",
            f"{found.bytes_sent / 1e9:,.1f}",
            f"{found.peak_bytes / 1e9:,.1f}",
            "yes" if found.peak_bytes <= cluster.device.memory_bytes else "no",
            f"{1e3 * found.joules / tokens:,.2f}",
        )
    return table


def _idle(row: SimulatedRow, found: Prediction) -> int:
    return idle_ranks(found.plan, row.size.lengths)


def _flops_per_second(row: SimulatedRow, found: Prediction) -> float:
    """Return the useful flops/s, which are fair to a model that grows with the ranks."""
    return step_flops(row.size.model, row.size.lengths) / found.step_seconds
