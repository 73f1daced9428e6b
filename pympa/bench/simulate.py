"""`--backend virtual`: experiments on a cluster that is not here, their tables and records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pympa.bench.clocks import Offset
from pympa.bench.experiment import (
    PlannedRun,
    Size,
    load_experiment,
    packaged_experiments,
)
from pympa.bench.predict import Prediction, SimulatedRow, fastest, predict
from pympa.bench.record_file import RecordFile
from pympa.bench.simulated import simulated_record, simulated_table
from pympa.bench.slow import parse_slow
from pympa.bench.text_table import show
from pympa.bench.timeline import TimelineFile
from pympa.cluster import Cluster, load_cluster, packaged_clusters
from pympa.command import REFUSED, complain
from pympa.costs import costs_of
from pympa.errors import RefusedError
from pympa.mesh import Plan
from pympa.partition import stage_bounds
from pympa.rules import check_plan
from pympa.spec import numpy_dtype
from pympa.text import shown
from pympa.virtual import Slow


def simulate(options: argparse.Namespace) -> int:
    """Predict all experiments, print their tables and return the exit status.

    It is 0, or 1 if a plan was refused, or 2 if all were.

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
    names = options.experiments or packaged_experiments()
    experiments = [load_experiment(name) for name in names]
    sizes = [e.size(options.size, name) for e, name in zip(experiments, names, strict=True)]
    if options.routing_from is not None and not any(size.model.has_experts for size in sizes):
        raise RefusedError(f"--routing-from: none of {', '.join(names)} has experts")
    refused: list[str] = []
    simulated = 0
    for name, experiment, size in zip(names, experiments, sizes, strict=True):
        runs = experiment.runs(options.plan or (), name)
        dtype = options.dtype or experiment.dtype
        rows, why = simulated_rows(runs, size, dtype, options.weight_limit, cluster)
        refused += why
        for text in why:
            complain(RefusedError(text))
        if rows:
            _simulate_experiment(name, rows, options, cluster, slow, output, timeline)
        simulated += len(rows)
    if refused:
        return 1 if simulated else REFUSED
    return 0


def _simulate_experiment(
    name: str,
    planned: Sequence[SimulatedRow],
    options: argparse.Namespace,
    cluster: Cluster,
    slow: Slow,
    output: RecordFile,
    timeline: TimelineFile,
) -> None:
    """Predict the rows of one experiment and print its table."""
    experiment, short = load_experiment(name), Path(name).name.removesuffix(".toml")
    size, dtype = experiment.size(options.size, name), options.dtype or experiment.dtype
    loads = _measured_loads(options.routing_from, short, size)
    rows = []
    for row in planned:
        print(shown(f"{short}: {row.planned.role} {row.plan}"), file=sys.stderr, flush=True)

        def run(plan: Plan, row: SimulatedRow = row, *, whole: bool = False) -> Prediction:
            return predict(
                row.size,
                plan,
                dtype,
                cluster,
                slow,
                stages=row.stages,
                loads=loads,
                whole=whole,
            )

        found = fastest(run, row, dtype, cluster)
        record = simulated_record(short, options, row, found, dtype, cluster)
        output.write(record)
        if options.trace is not None:
            steps = [rank.step for rank in run(found.plan, whole=True).ranks if rank.step]
            timeline.write(record, steps, [Offset(0.0, 0.0)] * len(steps))
        rows.append((row, found))
    notes = [f"slower than the cluster: {'; '.join(options.slow)}"] if options.slow else []
    if size.model.has_experts:
        notes.append(f"experts take {'even' if loads is None else 'measured'} loads")
    title = f"{short} ({options.size}: {size} tokens, {dtype}), simulated on {cluster.title}"
    show(simulated_table(title, dtype, cluster, rows, notes))


def simulated_rows(
    runs: Sequence[PlannedRun], size: Size, dtype: str, limit_bytes: int | None, cluster: Cluster
) -> tuple[list[SimulatedRow], list[str]]:
    """Return rows for the runs that the cluster can do, and why it cannot do others."""
    rows, refused = [], []
    for planned in runs:
        try:
            rows.append(simulated_row(planned, size, dtype, cluster, limit_bytes))
        except ValueError as error:
            refused.append(str(error))
    return rows, [*dict.fromkeys(refused)]


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
    check_plan(plan, of_row.model, ranks, of_row.batch, sum(of_row.lengths))
    costs_of(cluster.device, dtype, ranks)  # refuses a dtype that the device has no figures of
    itemsize = numpy_dtype(dtype).itemsize
    stages = stage_bounds(
        of_row.model, plan, max(size.lengths), itemsize=itemsize, limit_bytes=limit_bytes
    )
    return SimulatedRow(planned, plan, of_row, stages)


def _measured_loads(path: str | None, experiment: str, size: Size) -> list[int] | None:
    """Return the rows that each expert took in a measured run, all its layers together.

    Raises:
        ValueError: no record of the experiment tells.
    """
    if path is None or not size.model.has_experts:
        return None
    for record in RecordFile.load(path):
        if record.experiment == experiment and record.clock == "measured" and record.experts:
            return [sum(rows) for rows in zip(*record.experts.rows, strict=True)]
    raise ValueError(
        f"--routing-from {path}: expected a measured record of {experiment} with the rows of its "
        "experts; got none"
    )
