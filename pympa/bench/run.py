"""Experiments one after the other: what fits, what is still missing, what came out."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
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
from pympa.bench.record import Record, RecordFile
from pympa.bench.resume import StopSignal, find_measured
from pympa.bench.table import console, result_table
from pympa.bench.timeline import TimelineFile
from pympa.bench.truth import Job, Truth
from pympa.errors import RefusedError
from pympa.mesh import Plan
from pympa.rules import check_plan
from pympa.session import Session
from pympa.spec import numpy_dtype
from pympa.weights import PhiloxSource

LONG_STEP_SECONDS = 10.0


@dataclass(frozen=True)
class Task:
    """One experiment of this job.

    Attributes:
        name: for records and tables.
        experiment: the file. size: the one asked for.
        planned: rows of the table with their plans.
    """

    name: str
    experiment: Experiment
    size: Size
    planned: tuple[tuple[PlannedRun, Plan], ...]


def run(session: Session, options: argparse.Namespace) -> int:
    """Run all experiments and return the exit status: 0, or 1 if a plan failed. Collective.

    SIGUSR1 on any rank ends the job after the plan in hand, with what was measured so far.
    """
    if options.resume and options.output is None:
        raise RefusedError("--resume needs --output, the file to continue")
    names = options.experiments or packaged_experiments()
    tasks = session.check(lambda: [_task(name, options, session.size) for name in names])
    if options.router_skew is not None and not any(t.size.model.has_experts for t in tasks):
        raise RefusedError(f"--router-skew: none of {', '.join(names)} has experts")
    output = session.check(lambda: RecordFile(options.output if session.rank == 0 else None))
    earlier = session.check(lambda: output.read() if options.resume else [])
    earlier = session.world.gather_objects(earlier)[0]
    timeline = session.check(lambda: TimelineFile(options.trace, session, beside=options.output))
    failures: list[str] = []
    stop = StopSignal(session)
    for task in tasks:
        if not stop.agreed:
            failures += _run_experiment(session, options, task, output, timeline, earlier, stop)
    if session.rank == 0:
        if stop.agreed:
            print("stopped by SIGUSR1; --resume continues", file=sys.stderr, flush=True)
        if failures:
            print("pympa: " + "\n".join(failures), file=sys.stderr, flush=True)
    return 1 if failures else 0


def _task(name: str, options: argparse.Namespace, world: int) -> Task:
    experiment = load_experiment(name)
    numpy_dtype(options.dtype or experiment.dtype)
    size = experiment.size(options.size, name)
    if options.router_skew is not None:
        size = size.skewed(options.router_skew)
    runs = [PlannedRun(role="given", plan=text) for text in options.plan or []]
    planned = [(row, row.resolve(size.model, world)) for row in runs or experiment.plans]
    for _, plan in planned:
        check_plan(plan, size.model, world, size.batch)
    return Task(Path(name).name.removesuffix(".toml"), experiment, size, tuple(planned))


def _run_experiment(
    session: Session,
    options: argparse.Namespace,
    task: Task,
    output: RecordFile,
    timeline: TimelineFile,
    earlier: list[Record],
    stop: StopSignal,
) -> list[str]:
    """Measure the plans of one experiment, print its table and return what failed."""
    name, size = task.name, task.size
    dtype = numpy_dtype(options.dtype or task.experiment.dtype)
    ids = session.check(lambda: load_ids(options.input, size))
    job = Job(name, options.size, size, dtype, tuple(ids), PhiloxSource())
    failures: list[str] = []
    fitting: list[tuple[PlannedRun, list[Plan]]] = []
    for row, plan in task.planned:
        variants, complaint = fitting_plans(session, job, row, plan)
        if variants:
            fitting.append((row, variants))
        else:
            failures.append(f"{name}: {complaint}")
    measured = find_measured(earlier, job, fitting, session, options)
    wanted = [
        (repeat, index)
        for repeat in range(1, options.repeat + 1)
        for index in range(len(fitting))
        if (repeat, index) not in measured
    ]
    truth = None
    if wanted and not options.no_verify:
        _progress(session, f"{name}: computing the float64 oracle")
        truth = Truth(session, job)
    machine = measure_machine(session, dtype.name)
    wrong: set[int] = set()
    for repeat, index in wanted:
        if index in wrong:
            continue
        row, variants = fitting[index]
        least = roofline(job, session, machine)
        hint = f" (a step takes at least {least:,.0f} s here)" if least > LONG_STEP_SECONDS else ""
        search = ", searching micro_batches" if len(variants) > 1 else ""
        turn = f" ({repeat} of {options.repeat})" if options.repeat > 1 else ""
        _progress(session, f"{name}: {row.role} {variants[0]}{turn}{search}{hint}")
        result = run_plan(session, job, row, variants, truth, machine, repeat, options, timeline)
        if isinstance(result, str):
            failures.append(f"{name}: {result}")
            wrong.add(index)
            continue
        measured[repeat, index] = result
        output.write(result)
        checked = "verified" if result.verified else "not verified" if result.exact else "not exact"
        _progress(session, f"{name}: {result.plan} {checked}, {result.tps:,.0f} tokens/s")
        if stop.agree():
            break
    if session.rank == 0 and measured:
        what = f"{name} ({options.size}: {size} tokens, {dtype.name})"
        rows = [
            [measured[key] for key in sorted(measured) if key[1] == index]
            for index in range(len(fitting))
        ]
        console().print(result_table(what, [row for row in rows if row]))
    return failures


def _progress(session: Session, text: str) -> None:
    if session.rank == 0:
        print(text, file=sys.stderr, flush=True)
