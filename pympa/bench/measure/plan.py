"""One plan of one job: does it fit into memory, is it correct, and how fast is it?"""

from __future__ import annotations

import argparse
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from pympa.bench.measure.candidate import Candidate
from pympa.bench.measure.energy import joules_per_token
from pympa.bench.measure.room import rehearsal
from pympa.bench.measure.timing import TimedSteps, roofline, time_steps
from pympa.bench.measure.truth import Truth
from pympa.bench.records.building import step_record
from pympa.bench.records.record import Record, StageUse, by_rank, environment, expert_use, spread
from pympa.bench.report.timeline import TimelineFile
from pympa.footprint.working_set import most_rows, working_sets
from pympa.hardware.device_cupy import nvtx_ranges
from pympa.hardware.memory import process_peak_bytes, reset_process_peak
from pympa.kernels.peaks import Machine
from pympa.model.model import Model, Prepared
from pympa.model.resources import RankResources
from pympa.plan.mesh import Plan, parse_plan
from pympa.plan.micro_batches import try_until_slower
from pympa.runtime.step import Step
from pympa.session.team import Team
from pympa.verify.verdict import Verdict


class FailedVerificationError(Exception):
    """A plan's outputs are less accurate than the contract allows."""

    def __init__(self, plan: Plan, verdict: Verdict) -> None:
        super().__init__(f"plan {plan} failed verification: {verdict.failed[0]}")


def run_plan(
    team: Team,
    candidate: Candidate,
    truth: Truth | None,
    machine: Machine,
    repeat: int,
    options: argparse.Namespace,
    timeline: TimelineFile,
) -> Record | str:
    """Verify and time a plan, and return the fastest of its variants in micro-batches. Collective.

    Returns:
        The record, or the message of the failed verification.
    """
    reset_process_peak()
    resources = team.resources(candidate.variants[0])
    if options.nvtx:
        resources.trace.named_ranges = nvtx_ranges()
    try:
        tried = _try_variants(team, resources, candidate, truth, machine, options)
    except FailedVerificationError as error:
        resources.arena.close()
        return str(error)
    # Not after another error, which ends the job: a device would wait for unfinished messages.
    resources.arena.close()
    best, step = max(tried, key=lambda pair: pair[0].tps)
    several = len(candidate.variants) > 1
    searched = {record.plan: record.tps for record, _ in tried} if several else {}
    use = _stage_use(team, candidate, parse_plan(best.plan))
    best = msgspec.structs.replace(best, searched=searched, repeat=repeat, stages=use)
    timeline.add(best, step, resources.trace.host_clock, team.world)
    return best


def _try_variants(
    team: Team,
    resources: RankResources,
    candidate: Candidate,
    truth: Truth | None,
    machine: Machine,
    options: argparse.Namespace,
) -> list[tuple[Record, Step]]:
    """Return each variant's record and last step. Collective.

    Raises:
        FailedVerificationError: a variant's outputs are wrong.
    """
    job, stages = candidate.job, candidate.row.stages
    model = Model(job.size.model, resources, job.dtype, job.source, stages=stages)
    loading_peak = resources.arena.restart_peak()

    def attempt(variant: Plan) -> tuple[Record, Step] | None:
        if not candidate.fits(team, variant):
            return None
        with resources.arena.scope():
            prepared = model.prepare(job.ids, variant.micro_batches)
            verdicts = _verify(truth, team, model, prepared)
            if verdicts is not None and variant.exact and not verdicts[0].passed:
                raise FailedVerificationError(variant, verdicts[0])
            timed = time_steps(team, resources, model, prepared, options, loading_peak)
            record = _record(team, candidate, variant, resources, verdicts, machine, timed, options)
            step = resources.trace.last
            if options.energy:
                joules = joules_per_token(
                    team,
                    partial(model.forward, prepared),
                    tokens=sum(job.size.lengths),
                    step_seconds=record.step_seconds.median,
                )
                record = msgspec.structs.replace(record, joules_per_token=joules)
            return record, step

    return try_until_slower(candidate.variants, attempt, lambda pair: 1 / pair[0].tps)


def _stage_use(team: Team, candidate: Candidate, plan: Plan) -> StageUse | None:
    """Return the assignment of layers to stages and their working set. Collective."""
    if plan.pp == 1:
        return None
    job, stages = candidate.job, candidate.row.stages
    measure = working_sets(rehearsal(team, job, plan, stages))
    rows = most_rows(plan, job.size.lengths, plan.micro_batches)
    touched = max(working_set.total for working_set in measure(rows).values())
    return StageUse(
        list(stages),
        rows,
        max(team.world.gather_objects(touched)),
        candidate.cache_bytes,
        candidate.row.cuts_to_cache,
    )


def _verify(
    truth: Truth | None, team: Team, model: Model, prepared: Prepared
) -> tuple[Verdict, Verdict | None] | None:
    if truth is not None:
        return truth.judge(team, model, prepared)
    model.forward(prepared)
    return None


def _error_of(verdict: Verdict | None, name: str) -> float | None:
    """Return the norm of the error of one output."""
    if verdict is None:
        return None
    return next(error.norm for error in verdict.errors if error.name == name)


def _record(
    team: Team,
    candidate: Candidate,
    plan: Plan,
    resources: RankResources,
    verdicts: tuple[Verdict, Verdict | None] | None,
    machine: Machine,
    timed: TimedSteps,
    options: argparse.Namespace,
) -> Record:
    everyone = team.world.gather_objects((timed, process_peak_bytes()))
    ranks, process = zip(*everyone, strict=True)
    slowest = [max(of_ranks) for of_ranks in zip(*(r.seconds for r in ranks), strict=True)]
    rows: dict[int, NDArray[np.int64]] = {}
    for of_rank in ranks:
        for layer, taken in of_rank.load.items():
            rows[layer] = rows.get(layer, np.zeros_like(taken)) + taken
    job, worst = candidate.job, verdicts[0].worst if verdicts else None
    return step_record(
        candidate.row,
        plan,
        ranks,
        spread(slowest),
        least_seconds=roofline(job, team, machine),
        oversubscribed=team.oversubscribed,
        experiment=job.experiment,
        job=job.digest(options.warmup, options.no_shared_memory, team.isa),
        backend=team.backend,
        dtype=job.dtype.name,
        size=job.size_name,
        process_peak_bytes=by_rank(list(process)),
        error=worst.norm if worst else None,
        tolerance=worst.tolerance if worst else None,
        error_of=worst.name if worst else None,
        error_one_rank=_error_of(verdicts[1], worst.name) if verdicts and worst else None,
        sampled_rows=verdicts[0].sampled_rows if verdicts else None,
        verified=verdicts is not None and plan.exact,
        experts=expert_use(rows, sum(of_rank.dropped for of_rank in ranks)),
        router_skew=options.router_skew,
        shared_memory=resources.transports["ring"].shares_memory and plan.cp_scheme != "allgather",
        searched={},
        forecast=candidate.forecast,
        environment=environment(
            cores=team.processors,
            isa=team.isa,
            threads=team.threads,
            mpi=team.mpi_library,
            device=None if team.accelerator is None else team.accelerator.device.name,
            route=team.route,
            isa_note=team.isa_note,
        ),
    )
