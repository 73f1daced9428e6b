"""The main job: `mpirun -n 16 python -m pympa.bench [EXPERIMENT ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pympa.bench.experiment import (
    Experiment,
    PlannedRun,
    Size,
    load_experiment,
    load_ids,
    packaged_experiments,
)
from pympa.bench.measure import measure_machine, roofline, run_plan
from pympa.bench.memory import fitting_plans
from pympa.bench.options import parse_options
from pympa.bench.record import Record, RecordFile
from pympa.bench.table import console, experiment_list, result_table
from pympa.bench.truth import Job, Truth
from pympa.mesh import Plan, check_plan
from pympa.session import RefusedError, Session
from pympa.spec import numpy_dtype
from pympa.weights import PhiloxSource

LONG_STEP_SECONDS = 10.0
Planned = list[tuple[PlannedRun, Plan]]
Task = tuple[str, Experiment, Size, Planned]


def main(arguments: list[str]) -> int:
    """Run the job on this rank and return its exit status."""
    try:
        options, complaint = parse_options(arguments), None
    except RefusedError as error:
        options, complaint = parse_options([]), error
    session = Session(isa=options.isa, threads=options.threads, timeout_seconds=options.timeout)
    try:
        with session:
            session.agree("arguments", arguments)
            if complaint is not None:
                raise complaint
            return _run(session, options)
    except RefusedError as error:
        if session.rank == 0:
            print(f"pympa: {error}", file=sys.stderr, flush=True)
        return 2


def _run(session: Session, options: argparse.Namespace) -> int:
    names = options.experiments or packaged_experiments()
    if options.help is not None:
        if session.rank == 0:
            print(options.help)
        return 0
    if options.list:
        loaded = session.check(lambda: {name: load_experiment(name) for name in names})
        if session.rank == 0:
            console().print(experiment_list(loaded))
        return 0
    tasks = session.check(lambda: [_task(name, options, session.size) for name in names])
    output = session.check(lambda: RecordFile(options.output if session.rank == 0 else None))
    failures: list[str] = []
    for task in tasks:
        failures += _run_experiment(session, options, task, output)
    if failures and session.rank == 0:
        print("pympa: " + "\n".join(failures), file=sys.stderr, flush=True)
    return 1 if failures else 0


def _task(name: str, options: argparse.Namespace, world: int) -> Task:
    experiment = load_experiment(name)
    size = experiment.size(options.size, name)
    runs = [PlannedRun(role="given", plan=text) for text in options.plan or []]
    planned = [(run, run.resolve(size.model, world)) for run in runs or experiment.plans]
    for _, plan in planned:
        check_plan(plan, size.model, world, size.batch)
    return Path(name).name.removesuffix(".toml"), experiment, size, planned


def _run_experiment(
    session: Session, options: argparse.Namespace, task: Task, output: RecordFile
) -> list[str]:
    """Measure the plans of one experiment, print its table and return what failed."""
    name, experiment, size, planned = task
    dtype = numpy_dtype(options.dtype or experiment.dtype)
    ids = session.check(lambda: load_ids(options.input, size))
    job = Job(name, options.size, size, dtype, tuple(ids), PhiloxSource())
    failures: list[str] = []
    fitting: list[tuple[PlannedRun, list[Plan]]] = []
    for run, plan in planned:
        variants, complaint = fitting_plans(session, job, run, plan)
        if variants:
            fitting.append((run, variants))
        else:
            failures.append(f"{name}: {complaint}")
    truth = None
    if fitting and not options.no_verify:
        _progress(session, f"{name}: computing the float64 oracle")
        truth = Truth(session, job)
    machine = measure_machine(session, dtype.name)
    records: list[Record] = []
    for run, variants in fitting:
        least = roofline(job, session, machine)
        hint = f" (a step takes at least {least:,.0f} s here)" if least > LONG_STEP_SECONDS else ""
        search = ", searching micro_batches" if len(variants) > 1 else ""
        _progress(session, f"{name}: {run.role} {variants[0]}{search}{hint}")
        result = run_plan(session, job, run, variants, truth, machine, options)
        if isinstance(result, str):
            failures.append(f"{name}: {result}")
            continue
        records.append(result)
        output.write(result)
        checked = "verified" if result.verified else "not verified"
        _progress(session, f"{name}: {result.plan} {checked}, {result.tps:,.0f} tokens/s")
    if session.rank == 0 and records:
        what = f"{name} ({options.size}: {size.batch} × {size.tokens:,} tokens, {dtype.name})"
        console().print(result_table(what, records))
    return failures


def _progress(session: Session, text: str) -> None:
    if session.rank == 0:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
