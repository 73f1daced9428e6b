"""Run experiments one after the other: fit into memory, resume, measure, print the tables."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pympa.bench.experiment.description import (
    Experiment,
    Size,
    packaged_experiments,
)
from pympa.bench.experiment.input import check_input, load_ids
from pympa.bench.experiment.own_model import Batch, load_described
from pympa.bench.experiment.rows import Row, resolve_row
from pympa.bench.measure.candidate import Candidate, agreed_cache, find_candidate
from pympa.bench.measure.energy import open_counter
from pympa.bench.measure.forecast import forecast_cluster, forecasts
from pympa.bench.measure.plan import run_plan
from pympa.bench.measure.resume import StopSignal, check_isa, find_measured
from pympa.bench.measure.room import lacking_for_input
from pympa.bench.measure.timing import Machines, roofline
from pympa.bench.measure.truth import Job, Truth
from pympa.bench.records.file import RecordFile
from pympa.bench.records.record import Forecast, Record
from pympa.bench.report.table import result_table
from pympa.bench.report.timeline import TimelineFile
from pympa.checkpoint.checkpoint import Checkpoint
from pympa.command.line import REFUSED, complain
from pympa.costs.cluster import Cluster
from pympa.errors import RefusedError
from pympa.kernels.cuda import check_dtype
from pympa.kernels.peaks import Machine
from pympa.model.random_weights import philox_bits, random_weights
from pympa.model.weights import WeightSource
from pympa.session.room import Room
from pympa.session.team import Team
from pympa.spec import ModelSpec, numpy_dtype
from pympa.text.escape import shown
from pympa.text.table import show

LONG_STEP_SECONDS = 10.0  # longer steps are announced
TOO_LONG_STEP_SECONDS = 600.0  # longer steps are refused without --allow-long


@dataclass(frozen=True)
class Task:
    """One experiment of this job.

    Attributes:
        name: the name in records and tables.
        experiment: the contents of its file.
        size: the requested size.
        rows: the rows of the table.
        left_out: the numbers of ranks of the rows that need more ranks than the job has.
        refused: the reasons why other rows cannot run here.
        forecasts: the simulated result of each row at the paper's size.
        checkpoint: the weights of a user's own model; None means random ones.
    """

    name: str
    experiment: Experiment
    size: Size
    rows: tuple[Row, ...]
    left_out: tuple[int, ...]
    refused: tuple[str, ...] = ()
    forecasts: tuple[Forecast | None, ...] = ()
    checkpoint: Checkpoint | None = None

    def source(self, model: ModelSpec) -> WeightSource:
        """Return the weights of the model, which a row may have grown."""
        return random_weights(model) if self.checkpoint is None else self.checkpoint.source


def run(team: Team, options: argparse.Namespace) -> int:
    """Run all experiments and return the exit status. Collective.

    It is 0, or 1 if a plan failed or was refused, or 2 if all were refused.

    SIGUSR1 on any rank ends the job after the current plan, with what was measured so far.
    """
    if options.resume and options.output is None:
        raise RefusedError("--resume needs --output FILE.jsonl, the file of the run to continue")
    names = options.experiments or packaged_experiments()
    tasks = team.check(lambda: [_task(name, options, team.size) for name in names])
    refused = _report_refused(team, tasks)
    if refused and not any(task.rows for task in tasks):
        return REFUSED
    if options.router_skew is not None and not any(t.size.model.has_experts for t in tasks):
        raise RefusedError(
            f"--router-skew: expected an experiment with experts; got {', '.join(names)}"
        )
    team.check(lambda: check_input(options.input))
    output = team.check(lambda: RecordFile(options.output if team.rank == 0 else None))
    earlier = team.check(lambda: output.read() if options.resume else output.end_line())
    earlier = team.world.gather_objects(earlier or [])[0]
    check_isa(earlier, team)
    timeline = team.check(
        lambda: TimelineFile(options.trace, rank=team.rank, beside=options.output)
    )
    cluster = team.check(lambda: forecast_cluster(options.cluster))
    if options.energy and team.accelerator is not None:
        team.check(partial(open_counter, team.accelerator.device.bus_id))
    tasks = _with_forecasts(team, tasks, cluster, options.dtype)
    failures: list[str] = []
    stop, machines = StopSignal(team), Machines(team)
    for task in tasks:
        if not stop.agreed:
            failures += _run_experiment(
                team, options, task, machines, output, timeline, earlier, stop
            )
    if team.rank == 0:
        if stop.agreed:
            print(
                "stopped by SIGUSR1; run the same command with --resume to continue",
                file=sys.stderr,
                flush=True,
            )
        if failures:
            print("pympa: " + "\n".join(map(shown, failures)), file=sys.stderr, flush=True)
    return 1 if failures or refused else 0


def _task(name: str, options: argparse.Namespace, world: int) -> Task:
    described = load_described(name, Batch.of(options), with_weights=True)
    experiment = described.experiment
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
            row = resolve_row(
                planned, size, ranks, itemsize=dtype.itemsize, limit_bytes=options.weight_limit
            )
            rows.append(row)
        except ValueError as error:
            refused.append(str(error))
    if not rows and not refused and name in options.experiments:
        raise RefusedError(
            f"{name}: {_too_large(left_out, world)}: use mpirun -n {max(left_out)}, or "
            f"-n {min(left_out)} for the smallest row"
        )
    name = Path(name).name.removesuffix(".toml")
    return Task(
        name,
        experiment,
        size,
        tuple(rows),
        tuple(left_out),
        tuple(dict.fromkeys(refused)),
        checkpoint=described.checkpoint,
    )


def _report_refused(team: Team, tasks: Sequence[Task]) -> list[str]:
    """Print why rows cannot run, and return the reasons. Collective.

    Raises:
        RefusedError: the ranks differ in them, for example because they read different files.
    """
    rows = [(task.name, [str(row.plan) for row in task.rows], task.refused) for task in tasks]
    team.agree("plans", rows)
    refused = [text for task in tasks for text in task.refused]
    if team.rank == 0:
        for text in refused:
            complain(RefusedError(text))
    return refused


def _with_forecasts(
    team: Team, tasks: Sequence[Task], cluster: Cluster | None, dtype: str | None
) -> list[Task]:
    """Return the tasks with the simulated results of their rows. Collective."""
    planned = [(task.experiment, row.planned) for task in tasks for row in task.rows]
    if cluster is not None and any("paper" in task.experiment.sizes for task in tasks):
        _progress(team, f"simulating {len(planned)} plans at paper size on {cluster.title}")
    found = iter(forecasts(team, planned, cluster, dtype))
    return [replace(task, forecasts=tuple(next(found) for _ in task.rows)) for task in tasks]


def _run_experiment(
    team: Team,
    options: argparse.Namespace,
    task: Task,
    machines: Machines,
    output: RecordFile,
    timeline: TimelineFile,
    earlier: list[Record],
    stop: StopSignal,
) -> list[str]:
    """Measure the plans of one experiment, print its table, return the failures. Collective."""
    if not task.rows and task.left_out:
        _progress(team, f"{task.name}: left out: {_too_large(task.left_out, team.size)}")
    if not task.rows:
        return []
    candidates, failures = _find_candidates(team, options, task)
    measured = find_measured(earlier, candidates, team, options)
    failures += _measure(team, options, candidates, machines, measured, output, timeline, stop)
    if team.rank == 0 and measured:
        _print_result(team, options, task, measured)
    return failures


def _find_candidates(
    team: Team, options: argparse.Namespace, task: Task
) -> tuple[list[Candidate], list[str]]:
    """Return the rows that can be measured, and the reasons why others cannot. Collective."""
    dtype = numpy_dtype(options.dtype or task.experiment.dtype)
    cache_bytes, room = agreed_cache(team, options.cache), Room(team)
    job = Job(task.name, options.size, task.size, dtype, (), task.source(task.size.model))
    lacking = lacking_for_input(room, job)
    if lacking is not None:
        return [], [f"{task.name}: {lacking}"]
    candidates, failures = [], []
    for row, forecast in zip(task.rows, task.forecasts, strict=True):
        times = row.planned.grow
        size_name = options.size if times == 1 else f"{options.size}, {times} × the layers"
        source = task.source(row.size.model)
        of_row = replace(job, size_name=size_name, size=row.size, source=source)
        found = find_candidate(team, of_row, row, room, cache_bytes, verifies=not options.no_verify)
        if isinstance(found, str):
            failures.append(f"{task.name}: {found}")
        else:
            candidates.append(replace(found, forecast=forecast))
    if candidates:  # the input fits into memory
        ids = tuple(team.check(lambda: _input_ids(options.input, task)))
        candidates = [replace(each, job=replace(each.job, ids=ids)) for each in candidates]
    return candidates, failures


def _input_ids(path: str | None, task: Task) -> Sequence[NDArray[np.int32]]:
    """Return the token ids of a task; of a model without a tokenizer, any ids that it knows."""
    if task.checkpoint is None:
        return load_ids(path, task.size)
    tokenizer = task.checkpoint.tokenizer()
    if tokenizer is None and path is not None:
        raise RefusedError(
            f"{task.checkpoint.where}: --input: expected a model with a tokenizer.json; without it "
            "token ids are arbitrary, the same ones for any text"
        )
    if tokenizer is None:
        return load_ids(path, task.size, partial(_any_ids, vocabulary=task.size.model.vocabulary))
    return load_ids(path, task.size, tokenizer.encode)


def _any_ids(text: str, vocabulary: int) -> Sequence[int]:
    """Return as many token ids as a text has characters, the same ones for the same length."""
    bits = philox_bits("ids", 0, len(text))
    found: list[int] = (bits % np.uint32(vocabulary)).tolist()
    return found


def _measure(
    team: Team,
    options: argparse.Namespace,
    candidates: Sequence[Candidate],
    machines: Machines,
    measured: dict[tuple[int, int], Record],
    output: RecordFile,
    timeline: TimelineFile,
    stop: StopSignal,
) -> list[str]:
    """Add the missing records to `measured`, by (repeat, row); return the failures. Collective."""
    truths: dict[str, Truth] = {}
    wrong: dict[int, str] = {}
    for repeat, index in itertools.product(range(1, options.repeat + 1), range(len(candidates))):
        if index in wrong or (repeat, index) in measured:
            continue
        candidate = candidates[index]
        job = candidate.job
        machine = machines.of(job.dtype.name)
        long = _too_long(team, candidate, machine, options)
        if long is not None:
            wrong[index] = f"{job.experiment}: {long}"
            continue
        if job.size_name not in truths and not options.no_verify:
            _progress(team, f"{job.experiment}: computing the float64 oracle")
            checks = {each.check for each in candidates if each.job.size_name == job.size_name}
            truths[job.size_name] = Truth(team, job, samples="sampled" in checks)

        def measure(
            team: Team,
            candidate: Candidate = candidate,
            machine: Machine = machine,
            repeat: int = repeat,
        ) -> Record | str:
            _announce(team, candidate, machine, repeat, options)
            truth = truths.get(candidate.job.size_name)
            return run_plan(team, candidate, truth, machine, repeat, options, timeline)

        result = team.on_first(candidate.row.plan.world, measure)
        if isinstance(result, str):
            wrong[index] = f"{job.experiment}: {result}"
            continue
        measured[repeat, index] = result
        output.write(result)
        checked = "verified" if result.verified else "not verified" if result.exact else "not exact"
        _progress(team, f"{job.experiment}: {result.plan} {checked}, {result.tps:,.0f} tokens/s")
        if stop.agree():
            break
    return [*wrong.values()]


def _too_long(
    team: Team, candidate: Candidate, machine: Machine, options: argparse.Namespace
) -> str | None:
    """Return a message if a plan takes too long and --allow-long is not given, or None."""
    job, plan = candidate.job, candidate.variants[0]
    least = roofline(job, team, machine, plan.world)
    if options.allow_long or least <= TOO_LONG_STEP_SECONDS:
        return None
    # The first one is verified, or warms up.
    steps = (1 + (options.warmup or 0) + options.iterations) * options.repeat
    return (
        f"plan {plan} at size {job.size_name}: a step takes at least {least:,.0f} s here, and "
        f"{steps} steps take {steps * least:,.0f} s; start it with --allow-long, or use another "
        "size, more ranks or fewer --iterations"
    )


def _print_result(
    team: Team,
    options: argparse.Namespace,
    task: Task,
    measured: Mapping[tuple[int, int], Record],
) -> None:
    """Print the table of the measured records, by (repeat, row)."""
    dtype = options.dtype or task.experiment.dtype
    title = f"{task.name} ({options.size}: {task.size} tokens, {dtype})"
    rows = [
        [measured[key] for key in sorted(measured) if key[1] == index]
        for index in sorted({index for _, index in measured})
    ]
    notes = []
    if task.left_out:
        notes.append(f"left out: {_too_large(task.left_out, team.size)}")
    notes += [f"refused: {text}" for text in task.refused]
    scales = task.experiment.scales and not options.plan
    show(result_table(title, rows, notes, scales=scales))


def _too_large(ranks: Sequence[int], world: int) -> str:
    return f"rows need {', '.join(map(str, ranks))} ranks; this job has {world}"


def _announce(
    team: Team, candidate: Candidate, machine: Machine, repeat: int, options: argparse.Namespace
) -> None:
    """Print the plan that is measured next."""
    job, variants = candidate.job, candidate.variants
    least = roofline(job, team, machine)
    hint = f" (a step takes at least {least:,.0f} s here)" if least > LONG_STEP_SECONDS else ""
    search = ", searching micro_batches" if len(variants) > 1 else ""
    repetition = f" ({repeat} of {options.repeat})" if options.repeat > 1 else ""
    role = candidate.row.planned.role
    _progress(team, f"{job.experiment}: {role} {variants[0]}{repetition}{search}{hint}")


def _progress(team: Team, text: str) -> None:
    if team.rank == 0:
        print(shown(text), file=sys.stderr, flush=True)
