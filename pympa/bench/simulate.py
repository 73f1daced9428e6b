"""`--backend virtual`: experiments on a cluster that is not here, their tables and records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from pympa.bench.clocks import Offset
from pympa.bench.experiment import (
    Experiment,
    PlannedRun,
    Size,
    load_experiment,
    packaged_experiments,
)
from pympa.bench.predict import Prediction, fastest, predict
from pympa.bench.record import Record, RecordFile
from pympa.bench.simulated import SimulatedRow, simulated_record, simulated_table
from pympa.bench.slow import parse_slow
from pympa.bench.table import console
from pympa.bench.timeline import TimelineFile
from pympa.cluster import Cluster, load_cluster, packaged_clusters
from pympa.errors import RefusedError
from pympa.partition import stage_bounds
from pympa.rules import check_plan
from pympa.spec import numpy_dtype
from pympa.virtual import Slow


def simulate(options: argparse.Namespace) -> int:
    """Predict all experiments, print their tables and return the exit status.

    Raises:
        RefusedError: no cluster is named.
        ValueError: an experiment, cluster, dtype, plan or slow part that is not allowed.
    """
    if options.cluster is None:
        raise RefusedError(
            f"--backend virtual needs --cluster: one of {', '.join(packaged_clusters())}, or a "
            ".toml file"
        )
    cluster = load_cluster(options.cluster)
    slow = parse_slow(options.slow or [], cluster.ranks)
    output = RecordFile(options.output)
    timeline = TimelineFile(options.trace, rank=0, beside=options.output)
    for name in options.experiments or packaged_experiments():
        experiment = load_experiment(name)
        short = Path(name).name.removesuffix(".toml")
        dtype = options.dtype or experiment.dtype
        rows = []
        for row in simulated_rows(experiment, name, options, dtype, cluster):
            print(f"{short}: {row.planned.role} {row.plan}", file=sys.stderr, flush=True)
            found = fastest(
                row.size, row.planned, row.plan, dtype, cluster, slow, stages=row.stages
            )
            record = simulated_record(short, options, row, found, dtype, cluster)
            output.write(record)
            if options.trace is not None:
                _trace(timeline, record, row, found, dtype, cluster, slow)
            rows.append((row, found))
        title = (
            f"{short} ({options.size}: {experiment.size(options.size, name)} tokens, {dtype}), "
            f"simulated on {cluster.title}"
        )
        notes = [f"slower than the cluster: {'; '.join(options.slow)}"] if options.slow else []
        console().print(simulated_table(title, dtype, cluster, rows, notes))
    return 0


def simulated_rows(
    experiment: Experiment, name: str, options: argparse.Namespace, dtype: str, cluster: Cluster
) -> Iterator[SimulatedRow]:
    """Yield the rows of an experiment's table, or the plans that are asked for, once checked.

    Raises:
        ValueError: a size or plan that is not allowed.
    """
    size = experiment.size(options.size, name)
    if options.router_skew is not None:
        size = size.skewed(options.router_skew)
    runs = [PlannedRun(role="given", plan=text) for text in options.plan or []]
    for planned in runs or experiment.plans:
        yield simulated_row(planned, size, dtype, cluster, options.weight_limit)


def simulated_row(
    planned: PlannedRun, size: Size, dtype: str, cluster: Cluster, limit_bytes: int | None
) -> SimulatedRow:
    """Return one row, after checking that its plan can run on the cluster.

    Raises:
        ValueError: it cannot.
    """
    ranks = planned.ranks or cluster.ranks
    of_row = size.grown(planned.grow)
    plan = planned.resolve(of_row.model, ranks)
    if planned.plan is not None and plan.world < cluster.ranks:
        ranks = plan.world  # a plan that is given may leave ranks of the cluster idle
    check_plan(plan, of_row.model, ranks, of_row.batch)
    itemsize = numpy_dtype(dtype).itemsize
    stages = stage_bounds(
        of_row.model, plan, max(size.lengths), itemsize=itemsize, limit_bytes=limit_bytes
    )
    return SimulatedRow(planned, plan, of_row, stages)


def _trace(
    timeline: TimelineFile,
    record: Record,
    row: SimulatedRow,
    found: Prediction,
    dtype: str,
    cluster: Cluster,
    slow: Slow,
) -> None:
    """Write the timeline of a plan, for which all of it is simulated."""
    whole = predict(row.size, found.plan, dtype, cluster, slow, stages=row.stages, whole=True)
    steps = [rank.step for rank in whole.ranks if rank.step is not None]
    timeline.write(record, steps, [Offset(0.0, 0.0)] * len(steps))
