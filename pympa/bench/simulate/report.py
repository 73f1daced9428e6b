"""A prediction as a record with `clock="simulated"`, and as a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pympa.bench.experiment.rows import Row
from pympa.bench.records.building import step_record
from pympa.bench.records.record import Record, Simulation, environment, spread
from pympa.bench.report.results import simulated_results
from pympa.bench.report.table import plan_cell
from pympa.costs.cluster import Cluster
from pympa.kernels.cpu import isa_of_profile
from pympa.plan.accounting import step_flops
from pympa.plan.rules import idle_line
from pympa.sim.predict import Prediction
from pympa.text.table import Table


def simulated_record(
    experiment: str,
    options: argparse.Namespace,
    row: Row,
    found: Prediction,
    dtype: str,
    cluster: Cluster,
) -> Record:
    """Return the record of a prediction.

    Args:
        experiment: the name of the experiment.
        options: the options of the command line.
        row: the row of the table.
        found: the prediction for the row.
        dtype: the dtype of weights and activations.
        cluster: the cluster of the prediction.
    """
    lengths = row.size.lengths
    peak = cluster.device.flops_per_second[dtype] * found.plan.world
    return step_record(
        row,
        found.plan,
        found.ranks,
        spread([found.step_seconds]),
        least_seconds=step_flops(row.size.model, lengths) / peak,
        experiment=experiment,
        backend="virtual",
        clock="simulated",
        dtype=dtype,
        size=options.size,
        process_peak_bytes=None,
        error=None,
        tolerance=None,
        error_of=None,
        error_one_rank=None,
        sampled_rows=None,
        verified=False,
        searched={},
        simulation=Simulation(
            cluster.title,
            list(options.slow or []),
            found.joules / sum(lengths),
            *found.layers,
            found.transport_calls,
        ),
        environment=environment(cores=1, isa=isa_of_profile(cluster.isa), threads=1, mpi="none"),
    )


def simulated_table(
    title: str,
    dtype: str,
    cluster: Cluster,
    rows: Sequence[tuple[Row, Prediction]],
    notes: Sequence[str] = (),
) -> Table:
    """Return published, simulated and physically possible speeds side by side.

    Args:
        title: the title of the table.
        dtype: the dtype of weights and activations.
        cluster: the cluster of the predictions.
        rows: the rows and their predictions.
        notes: the last lines of the caption.
    """
    results = simulated_results(rows, dtype, cluster)
    ran, passes = (sum(found.layers[i] for _, found in rows) for i in (0, 1))
    caption = [
        "possible tps: useful flops at the data sheet's peak of all ranks; waiting: share of the "
        "step, on the rank that waits most; mJ: board power × time in kernels",
        f"{ran:,} of {passes:,} passes of a rank through a layer were simulated; the others "
        "repeat them, so their times are extrapolated",
        *(idle_line(r.prediction.plan, r.idle_ranks) for r in results if r.idle_ranks),
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
    for result in results:
        planned, found = result.row.planned, result.prediction
        table.add_row(
            [*plan_cell(str(found.plan)), planned.role],
            str(found.plan.world),
            "-" if planned.published_tps is None else f"{planned.published_tps:,.0f}",
            f"{result.tps:,.0f}",
            f"{result.possible_tps:,.0f}",
            "-" if result.published_ratio is None else f"{result.published_ratio:.2f}",
            f"{result.ratio:.2f}",
            f"{result.waiting:.0%}",
            f"{found.bytes_sent / 1e9:,.1f}",
            f"{found.peak_bytes / 1e9:,.1f}",
            "yes" if result.fits else "no",
            f"{1e3 * result.joules_per_token:,.2f}",
        )
    return table
