"""One plan of one job: does it fit, is it right, how fast is it."""

from __future__ import annotations

import argparse
from collections import Counter
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from pympa.accounting import performed_flops, step_flops
from pympa.bench.candidate import Candidate
from pympa.bench.energy import joules_per_token
from pympa.bench.machine import Machine
from pympa.bench.memory import process_peak_bytes, reset_process_peak
from pympa.bench.record import Record, StageUse, by_rank, environment, expert_use, spread
from pympa.bench.room import rehearsal
from pympa.bench.timeline import TimelineFile
from pympa.bench.timing import Timing, roofline, time_steps
from pympa.bench.truth import Truth
from pympa.device_cupy import nvtx_ranges
from pympa.mesh import Plan, parse_plan
from pympa.model import Model, Prepared
from pympa.rank import Rank
from pympa.rules import idle_ranks
from pympa.step import Step
from pympa.team import Team
from pympa.verify import Verdict
from pympa.working_set import most_rows, working_sets

CLEARLY_SLOWER = 0.95


def run_plan(
    team: Team,
    candidate: Candidate,
    truth: Truth | None,
    machine: Machine,
    repeat: int,
    options: argparse.Namespace,
    timeline: TimelineFile,
) -> Record | str:
    """Verify and time a plan; of its variants in micro-batches keep the fastest. Collective.

    More micro-batches fill the pipeline better until they are too small to compute well, so the
    search ends where it gets clearly slower.

    Returns:
        The record, or why it failed verification.
    """
    reset_process_peak()
    rank = team.on(candidate.variants[0])
    if options.nvtx:
        rank.trace.named_ranges = nvtx_ranges()
    tried = _try_variants(team, rank, candidate, truth, machine, options)
    # Not after an error, which ends the job: a device would first wait for messages under way.
    rank.arena.close()
    if isinstance(tried, str):
        return tried
    best, step = max(tried, key=lambda pair: pair[0].tps)
    several = len(candidate.variants) > 1
    searched = {record.plan: record.tps for record, _ in tried} if several else {}
    use = _stage_use(team, candidate, parse_plan(best.plan))
    best = msgspec.structs.replace(best, searched=searched, repeat=repeat, stages=use)
    timeline.add(best, step, rank.trace.host_clock, team.world)
    return best


def _try_variants(
    team: Team,
    rank: Rank,
    candidate: Candidate,
    truth: Truth | None,
    machine: Machine,
    options: argparse.Namespace,
) -> list[tuple[Record, Step]] | str:
    """Return each variant's record and last step, or why one failed verification. Collective."""
    job, stages = candidate.job, candidate.row.stages
    model = Model(job.size.model, rank, job.dtype, job.source, stages=stages)
    loading_peak = rank.arena.restart_peak()
    tried: list[tuple[Record, Step]] = []
    for variant in candidate.variants:
        if not candidate.fits(team, variant):
            continue
        with rank.arena.scope():
            prepared = model.prepare(job.ids, variant.micro_batches)
            verdicts = _verify(truth, team, model, prepared)
            if verdicts is not None and variant.exact and not verdicts[0].passed:
                return _failure(variant, verdicts[0])
            timing = time_steps(team, rank, model, prepared, options, loading_peak)
            record = _record(team, candidate, variant, rank, verdicts, machine, timing, options)
            step = rank.trace.last
            if options.energy:
                joules = joules_per_token(
                    team,
                    partial(model.forward, prepared),
                    tokens=sum(job.size.lengths),
                    step_seconds=record.step_seconds.median,
                )
                record = msgspec.structs.replace(record, joules_per_token=joules)
            tried.append((record, step))
        if record.tps < CLEARLY_SLOWER * max(other.tps for other, _ in tried):
            break
    return tried


def _stage_use(team: Team, candidate: Candidate, plan: Plan) -> StageUse | None:
    """Return how the layers lie on stages and what their steps touch. Collective."""
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


def _failure(plan: Plan, verdict: Verdict) -> str:
    return f"plan {plan} failed verification: {verdict.failed[0]}"


def _error_of(verdict: Verdict | None, name: str) -> float | None:
    """Return the norm of one output's error."""
    if verdict is None:
        return None
    return next(error.norm for error in verdict.errors if error.name == name)


def _record(
    team: Team,
    candidate: Candidate,
    plan: Plan,
    rank: Rank,
    verdicts: tuple[Verdict, Verdict | None] | None,
    machine: Machine,
    timing: Timing,
    options: argparse.Namespace,
) -> Record:
    everyone = team.world.gather_objects((timing, process_peak_bytes()))
    timings, process = zip(*everyone, strict=True)
    waits = [sum(t.waits.values()) for t in timings]
    bubbles = [t.waits.get("pp", 0.0) for t in timings]
    job, planned = candidate.job, candidate.row.planned
    spec, lengths = job.size.model, job.size.lengths
    step = spread([max(iteration) for iteration in zip(*(t.seconds for t in timings), strict=True)])
    by_axis: Counter[str] = Counter()
    for of_rank in timings:
        for (axis, _), count in of_rank.sent.items():
            by_axis[axis] += count
    rows: dict[int, NDArray[np.int64]] = {}
    for of_rank in timings:
        for layer, taken in of_rank.load.items():
            rows[layer] = rows.get(layer, np.zeros_like(taken)) + taken
    worst = verdicts[0].worst if verdicts else None
    exposed = None if team.oversubscribed else max(waits) / step.median
    bubble = None if team.oversubscribed or plan.pp == 1 else max(bubbles) / step.median
    return Record(
        experiment=job.experiment,
        job=job.digest(options.warmup, options.no_shared_memory),
        role=planned.role,
        plan=str(plan),
        ranks=team.size,
        backend=team.backend,
        dtype=job.dtype.name,
        size=job.size_name,
        batch=job.size.batch,
        tokens=max(lengths),
        tps=sum(lengths) / step.median,
        tpot_ms=1e3 * step.median / sum(lengths),
        step_seconds=step,
        compute_seconds=by_rank([t.compute for t in timings]),
        comm_seconds=by_rank(waits),
        hidden_seconds=by_rank([t.hidden for t in timings]),
        overlap=timings[int(np.argmax(waits))].overlap,
        comm_fraction=exposed,
        bubble_fraction=bubble,
        bytes_sent=by_rank([t.sent.total() for t in timings]),
        bytes_received=by_rank([t.received.total() for t in timings]),
        bytes_sent_by_axis=dict(by_axis),
        peak_bytes=by_rank([t.peak_bytes for t in timings]),
        process_peak_bytes=by_rank(list(process)),
        flops_per_token=step_flops(spec, lengths) / sum(lengths),
        performed_flops=performed_flops(spec, plan, lengths) / step_flops(spec, lengths),
        roofline_fraction=roofline(job, team, machine) / step.median,
        idle_ranks=idle_ranks(plan, lengths),
        oversubscribed=team.oversubscribed,
        error=worst.norm if worst else None,
        tolerance=worst.tolerance if worst else None,
        error_of=worst.name if worst else None,
        error_one_rank=_error_of(verdicts[1], worst.name) if verdicts and worst else None,
        sampled_rows=verdicts[0].sampled_rows if verdicts else None,
        verified=verdicts is not None and plan.exact,
        exact=plan.exact,
        experts=expert_use(rows, sum(t.dropped for t in timings)),
        router_skew=options.router_skew,
        shared_memory=rank.transports["ring"].shares_memory and plan.cp_scheme != "allgather",
        searched={},
        forecast=candidate.row.forecast,
        published_tps=planned.published_tps,
        published_tpot_ms=planned.published_tpot_ms,
        environment=environment(
            cores=team.processors,
            isa=team.isa,
            threads=team.threads,
            mpi=team.mpi_library,
            device=None if team.accelerator is None else team.accelerator.device.name,
            route=team.route,
        ),
    )
