"""Experiments one after the other: what fits, what is still missing, what came out."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pympa.bench.candidate import Candidate, Row, agreed_cache, find_candidate
from pympa.bench.energy import open_counter
from pympa.bench.experiment import (
    Experiment,
    PlannedRun,
    Size,
    check_input,
    load_experiment,
    load_ids,
    packaged_experiments,
)
from pympa.bench.forecast import forecast_cluster, forecasts
from pympa.bench.machine import Machine
from pympa.bench.measure import run_plan
from pympa.bench.record import Record
from pympa.bench.record_file import RecordFile
from pympa.bench.resume import StopSignal, find_measured
from pympa.bench.room import Room
from pympa.bench.table import result_table
from pympa.bench.text_table import show
from pympa.bench.timeline import TimelineFile
from pympa.bench.timing import measure_machine, roofline
from pympa.bench.truth import Job, Truth
from pympa.cluster import Cluster
from pympa.command import REFUSED, complain
from pympa.errors import RefusedError
from pympa.kernels.cuda import check_dtype
from pympa.partition import stage_bounds
from pympa.rules import check_plan
from pympa.session import Session
from pympa.spec import numpy_dtype
from pympa.team import Team
from pympa.text import shown
from pympa.weights import PhiloxSource

LONG_STEP_SECONDS, TOO_LONG_STEP_SECONDS = 10.0, 600.0  # told; refused without --allow-long


@dataclass(frozen=True)
class Task:
    """One experiment of this job.

    Attributes:
        name: for records and tables.
        experiment: the file. size: the one asked for.
        rows: of the table. left_out: ranks of rows that take more than the job has.
        refused: why other rows cannot run here.
    """

    name: str
    experiment: Experiment
    size: Size
    rows: tuple[Row, ...]
    left_out: tuple[int, ...]
    refused: tuple[str, ...] = ()


def run(session: Session, options: argparse.Namespace) -> int:
    """Run all experiments and return the exit status. Collective.

    It is 0, or 1 if a plan failed or was refused, or 2 if all were refused.

    SIGUSR1 on any rank ends the job after the plan in hand, with what was measured so far.
    """
    if options.resume and options.output is None:
        raise RefusedError("--resume needs --output, the file to continue")
    names = options.experiments or packaged_experiments()
    tasks = session.check(lambda: [_task(name, options, session.size) for name in names])
    refused = _tell_refused(session, tasks)
    if refused and not any(task.rows for task in tasks):
        return REFUSED
    if options.router_skew is not None and not any(t.size.model.has_experts for t in tasks):
        raise RefusedError(f"--router-skew: none of {', '.join(names)} has experts")
    session.check(lambda: check_input(options.input))
    output = session.check(lambda: RecordFile(options.output if session.rank == 0 else None))
    earlier = session.check(lambda: output.read() if options.resume else output.end_line())
    earlier = session.world.gather_objects(earlier or [])[0]
    timeline = session.check(
        lambda: TimelineFile(options.trace, rank=session.rank, beside=options.output)
    )
    cluster = session.check(lambda: forecast_cluster(options.cluster))
    if options.energy and session.accelerator is not None:
        session.check(partial(open_counter, session.accelerator.device.bus_id))
    tasks = _with_forecasts(session, tasks, cluster, options.dtype)
    failures: list[str] = []
    stop = StopSignal(session)
    for task in tasks:
        if not stop.agreed:
            failures += _run_experiment(session, options, task, output, timeline, earlier, stop)
    if session.rank == 0:
        if stop.agreed:
            print("stopped by SIGUSR1; --resume continues", file=sys.stderr, flush=True)
        if failures:
            print("pympa: " + "\n".join(map(shown, failures)), file=sys.stderr, flush=True)
    return 1 if failures or refused else 0


def _task(name: str, options: argparse.Namespace, world: int) -> Task:
    experiment = load_experiment(name)
    dtype = numpy_dtype(options.dtype or experiment.dtype)
    if options.backend == "cuda":
        check_dtype(dtype)
    size = experiment.size(options.size, name)
    if options.router_skew is not None:
        size = size.skewed(options.router_skew)
    rows, left_out, refused = [], [], []
    for planned in experiment.runs(options.plan or (), name):
        ranks = planned.ranks or world
        if ranks > world:
            left_out.append(ranks)
            continue
        try:
            rows.append(_row(planned, size, ranks, dtype.itemsize, options.weight_limit))
        except ValueError as error:
            refused.append(str(error))
    if not rows and not refused and name in options.experiments:
        raise RefusedError(
            f"{name}: {_too_large(left_out, world)}: start it with mpirun -n {max(left_out)}, or "
            f"-n {min(left_out)} for the smallest row"
        )
    name = Path(name).name.removesuffix(".toml")
    return Task(name, experiment, size, tuple(rows), tuple(left_out), tuple(dict.fromkeys(refused)))


def _row(
    planned: PlannedRun, size: Size, ranks: int, itemsize: int, limit_bytes: int | None
) -> Row:
    """Return a row of the table for a number of ranks; purely local, the same on all of them.

    Raises:
        ValueError: it cannot run.
    """
    of_row = size.grown(planned.grow)
    plan = planned.resolve(of_row.model, ranks)
    check_plan(plan, of_row.model, ranks, size.batch, sum(size.lengths))
    stages = stage_bounds(
        of_row.model, plan, max(size.lengths), itemsize=itemsize, limit_bytes=limit_bytes
    )
    return Row(planned, plan, of_row, stages)


def _tell_refused(session: Session, tasks: Sequence[Task]) -> list[str]:
    """Tell why rows cannot run, and return it; the others do. Collective.

    Raises:
        RefusedError: the ranks do not agree on it, as where they read different files.
    """
    rows = [(task.name, [str(row.plan) for row in task.rows], task.refused) for task in tasks]
    session.agree("plans", rows)
    refused = [text for task in tasks for text in task.refused]
    if session.rank == 0:
        for text in refused:
            complain(RefusedError(text))
    return refused


def _with_forecasts(
    session: Session, tasks: Sequence[Task], cluster: Cluster | None, dtype: str | None
) -> list[Task]:
    """Return the tasks with what is simulated of their rows. Collective."""
    planned = [(task.experiment, row.planned) for task in tasks for row in task.rows]
    if cluster is not None and any("paper" in task.experiment.sizes for task in tasks):
        _progress(session, f"simulating {len(planned)} plans at paper size on {cluster.title}")
    found = iter(forecasts(session, planned, cluster, dtype))
    return [
        replace(task, rows=tuple(replace(row, forecast=next(found)) for row in task.rows))
        for task in tasks
    ]


def _run_experiment(
    session: Session,
    options: argparse.Namespace,
    task: Task,
    output: RecordFile,
    timeline: TimelineFile,
    earlier: list[Record],
    stop: StopSignal,
) -> list[str]:
    """Measure the plans of one experiment, print its table and return what failed. Collective."""
    if not task.rows and task.left_out:
        _progress(session, f"{task.name}: left out: {_too_large(task.left_out, session.size)}")
    if not task.rows:
        return []
    candidates, failures = _find_candidates(session, options, task)
    measured = find_measured(earlier, candidates, session, options)
    failures += _measure(session, options, candidates, measured, output, timeline, stop)
    if session.rank == 0 and measured:
        _print_result(session, options, task, measured)
    return failures


def _find_candidates(
    session: Session, options: argparse.Namespace, task: Task
) -> tuple[list[Candidate], list[str]]:
    """Return the rows that can be measured, and why others cannot. Collective."""
    dtype = numpy_dtype(options.dtype or task.experiment.dtype)
    cache_bytes, room = agreed_cache(session, options.cache), Room(session)
    job = Job(task.name, options.size, task.size, dtype, (), PhiloxSource())
    lacking = room.lacking_for_input(job)
    if lacking is not None:
        return [], [f"{task.name}: {lacking}"]
    candidates, failures = [], []
    for row in task.rows:
        times = row.planned.grow
        size_name = options.size if times == 1 else f"{options.size}, {times} × the layers"
        of_row = replace(job, size_name=size_name, size=row.size)
        found = find_candidate(
            session, of_row, row, room, cache_bytes, verifies=not options.no_verify
        )
        if isinstance(found, str):
            failures.append(f"{task.name}: {found}")
        else:
            candidates.append(found)
    if candidates:  # there is memory for the input
        ids = tuple(session.check(lambda: load_ids(options.input, task.size)))
        candidates = [replace(each, job=replace(each.job, ids=ids)) for each in candidates]
    return candidates, failures


def _measure(
    session: Session,
    options: argparse.Namespace,
    candidates: Sequence[Candidate],
    measured: dict[tuple[int, int], Record],
    output: RecordFile,
    timeline: TimelineFile,
    stop: StopSignal,
) -> list[str]:
    """Add to `measured`, by (repeat, row), what is missing; return what failed. Collective."""
    truths: dict[str, Truth] = {}
    wrong: dict[int, str] = {}
    machine: Machine | None = None
    for repeat, index in itertools.product(range(1, options.repeat + 1), range(len(candidates))):
        if index in wrong or (repeat, index) in measured:
            continue
        candidate = candidates[index]
        job = candidate.job
        machine = machine or measure_machine(session, job.dtype.name)
        long = _too_long(session, candidate, machine, options)
        if long is not None:
            wrong[index] = f"{job.experiment}: {long}"
            continue
        if job.size_name not in truths and not options.no_verify:
            _progress(session, f"{job.experiment}: computing the float64 oracle")
            checks = {each.check for each in candidates if each.job.size_name == job.size_name}
            truths[job.size_name] = Truth(session, job, samples="sampled" in checks)

        def measure(
            team: Team,
            candidate: Candidate = candidate,
            machine: Machine = machine,
            repeat: int = repeat,
        ) -> Record | str:
            _announce(team, candidate, machine, repeat, options)
            truth = truths.get(candidate.job.size_name)
            return run_plan(team, candidate, truth, machine, repeat, options, timeline)

        result = session.on_first(candidate.row.plan.world, measure)
        if isinstance(result, str):
            wrong[index] = f"{job.experiment}: {result}"
            continue
        measured[repeat, index] = result
        output.write(result)
        checked = "verified" if result.verified else "not verified" if result.exact else "not exact"
        _progress(session, f"{job.experiment}: {result.plan} {checked}, {result.tps:,.0f} tokens/s")
        if stop.agree():
            break
    return [*wrong.values()]


def _too_long(
    session: Session, candidate: Candidate, machine: Machine, options: argparse.Namespace
) -> str | None:
    """Say how long a plan takes at least, if that needs a word from the user and there is none."""
    job, plan = candidate.job, candidate.variants[0]
    least = roofline(job, session, machine, plan.world)
    if options.allow_long or least <= TOO_LONG_STEP_SECONDS:
        return None
    steps = (1 + options.warmup + options.iterations) * options.repeat  # 1 to verify, or warm up
    return (
        f"plan {plan} at size {job.size_name}: a step takes at least {least:,.0f} s here, and "
        f"{steps} steps {steps * least:,.0f} s; start it with --allow-long, or take another size, "
        "more ranks or fewer --iterations"
    )


def _print_result(
    session: Session,
    options: argparse.Namespace,
    task: Task,
    measured: Mapping[tuple[int, int], Record],
) -> None:
    """Print the table of what was measured, by (repeat, row)."""
    dtype = options.dtype or task.experiment.dtype
    title = f"{task.name} ({options.size}: {task.size} tokens, {dtype})"
    rows = [
        [measured[key] for key in sorted(measured) if key[1] == index]
        for index in sorted({index for _, index in measured})
    ]
    notes = []
    if task.left_out:
        notes.append(f"left out: {_too_large(task.left_out, session.size)}")
    notes += [f"refused: {text}" for text in task.refused]
    scales = task.experiment.scales and not options.plan
    show(result_table(title, rows, notes, scales=scales))


def _too_large(ranks: Sequence[int], world: int) -> str:
    return f"rows of {', '.join(map(str, ranks))} ranks; this job has {world}"


def _announce(
    team: Team, candidate: Candidate, machine: Machine, repeat: int, options: argparse.Namespace
) -> None:
    """Say what is measured now."""
    job, variants = candidate.job, candidate.variants
    least = roofline(job, team, machine)
    hint = f" (a step takes at least {least:,.0f} s here)" if least > LONG_STEP_SECONDS else ""
    search = ", searching micro_batches" if len(variants) > 1 else ""
    turn = f" ({repeat} of {options.repeat})" if options.repeat > 1 else ""
    role = candidate.row.planned.role
    _progress(team, f"{job.experiment}: {role} {variants[0]}{turn}{search}{hint}")


def _progress(team: Team, text: str) -> None:
    if team.rank == 0:
        print(shown(text), file=sys.stderr, flush=True)
