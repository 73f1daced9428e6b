"""`--backend virtual`: simulate experiments on a cluster; print tables and write records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pympa.bench.experiment.description import Experiment, Size, packaged_experiments
from pympa.bench.experiment.own_model import Batch, load_described
from pympa.bench.experiment.rows import Row
from pympa.bench.measure.clocks import Offset
from pympa.bench.records.file import RecordFile
from pympa.bench.report.timeline import TimelineFile
from pympa.bench.simulate.report import simulated_record, simulated_table
from pympa.bench.simulate.rows import fastest, simulated_rows
from pympa.command.line import REFUSED, complain
from pympa.costs.cluster import Cluster, load_cluster, packaged_clusters
from pympa.errors import RefusedError
from pympa.plan.mesh import Plan
from pympa.sim.predict import Prediction, predict
from pympa.sim.slow import parse_slow
from pympa.sim.world import Slow
from pympa.text.escape import shown
from pympa.text.table import show


def simulate(options: argparse.Namespace) -> int:
    """Predict all experiments, print their tables and return the exit status.

    The status is 0, or 1 if some plans were refused, or 2 if all were.

    Raises:
        RefusedError: --cluster is missing.
        ValueError: an experiment, cluster, dtype, plan or slow part is not allowed.
    """
    if options.cluster is None:
        raise RefusedError(
            f"--backend virtual needs --cluster: expected one of {', '.join(packaged_clusters())}, "
            "or a .toml file"
        )
    cluster = load_cluster(options.cluster)
    slow = parse_slow(options.slow or [], cluster.ranks)
    output = RecordFile(options.output)
    timeline = TimelineFile(options.trace, rank=0, beside=options.output)
    names = options.experiments or packaged_experiments()
    batch = Batch.of(options)
    experiments = [load_described(name, batch, with_weights=False).experiment for name in names]
    sizes = [e.size(options.size, name) for e, name in zip(experiments, names, strict=True)]
    if options.routing_from is not None and not any(size.model.has_experts for size in sizes):
        raise RefusedError(
            f"--routing-from: expected an experiment with experts; got {', '.join(names)}"
        )
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
            _simulate_experiment(name, experiment, rows, options, cluster, slow, output, timeline)
        simulated += len(rows)
    if refused:
        return 1 if simulated else REFUSED
    return 0


def _simulate_experiment(
    name: str,
    experiment: Experiment,
    planned: Sequence[Row],
    options: argparse.Namespace,
    cluster: Cluster,
    slow: Slow,
    output: RecordFile,
    timeline: TimelineFile,
) -> None:
    """Predict the rows of one experiment and print its table."""
    short = Path(name).name.removesuffix(".toml")
    size, dtype = experiment.size(options.size, name), options.dtype or experiment.dtype
    loads = _measured_loads(options.routing_from, short, size)
    rows = []
    for row in planned:
        print(shown(f"{short}: {row.planned.role} {row.plan}"), file=sys.stderr, flush=True)

        def run(plan: Plan, row: Row = row, *, whole: bool = False) -> Prediction:
            return predict(
                row.size.model,
                row.size.lengths,
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
    notes = [f"slowed down by --slow: {'; '.join(options.slow)}"] if options.slow else []
    if size.model.has_experts:
        notes.append(f"the experts' loads are {'even' if loads is None else 'measured'}")
    title = f"{short} ({options.size}: {size} tokens, {dtype}), simulated on {cluster.title}"
    show(simulated_table(title, dtype, cluster, rows, notes))


def _measured_loads(path: str | None, experiment: str, size: Size) -> list[int] | None:
    """Return the number of rows of each expert in a measured run, summed over its layers.

    Raises:
        ValueError: the file has no such record of the experiment.
    """
    if path is None or not size.model.has_experts:
        return None
    for record in RecordFile.load(path):
        if record.experiment == experiment and record.clock == "measured" and record.experts:
            return [sum(rows) for rows in zip(*record.experts.rows, strict=True)]
    raise ValueError(
        f"--routing-from {path}: expected a measured record of {experiment} with the rows of "
        "its experts; got none"
    )
