"""One plan of one job: does it fit, is it right, how fast is it."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from pympa.accounting import performed_flops, roofline_seconds, step_flops
from pympa.bench.experiment import PlannedRun
from pympa.bench.machine import Machine, measure_core
from pympa.bench.memory import process_peak_bytes, reset_process_peak
from pympa.bench.record import Record, by_rank, environment, expert_use, spread
from pympa.bench.timeline import TimelineFile
from pympa.bench.truth import Job, Truth
from pympa.mesh import Plan
from pympa.model import Model, Prepared
from pympa.rank import Rank
from pympa.session import Session
from pympa.trace import Overlap, Step, mean_times
from pympa.verify import Verdict

CLEARLY_SLOWER = 0.95


@dataclass(frozen=True)
class Timing:
    """This rank's timed steps.

    Attributes:
        seconds: of each step. compute: mean seconds in kernels.
        waits: mean seconds waited, by axis. hidden: mean seconds in flight without waiting.
        overlap: means, by axis. peak_bytes: of the arena, loading included.
        sent, received: bytes of one step by (axis, peer). load: rows sent to experts by layer.
        dropped: choices past an expert's capacity.
    """

    seconds: list[float]
    compute: float
    waits: dict[str, float]
    hidden: float
    overlap: dict[str, Overlap]
    peak_bytes: int
    sent: Counter[tuple[str, int]]
    received: Counter[tuple[str, int]]
    load: dict[int, NDArray[np.int64]]
    dropped: int


def measure_machine(session: Session, dtype: str) -> Machine:
    """Measure one core on rank 0 while the others wait. Collective."""
    machine = measure_core(dtype, session.isa) if session.rank == 0 else None
    measured: Machine = session.world.gather_objects(machine)[0]
    return measured


def roofline(job: Job, session: Session, machine: Machine) -> float:
    """Return the seconds that a step takes at least on the cores of this run."""
    return roofline_seconds(
        job.size.model,
        job.size.lengths,
        job.dtype.itemsize,
        flops_per_second=machine.flops_per_second,
        bytes_per_second=machine.bytes_per_second,
        cores=min(session.size * session.threads, session.total_cores),
    )


def run_plan(
    session: Session,
    job: Job,
    planned: PlannedRun,
    variants: Sequence[Plan],
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
    rank = session.on(variants[0])
    try:
        model = Model(job.size.model, rank, job.dtype, job.source)
        loading_peak = rank.arena.restart_peak()
        records: list[Record] = []
        steps: list[Step] = []  # the last one of each
        for variant in variants:
            with rank.arena.scope():
                prepared = model.prepare(job.ids, variant.micro_batches)
                verdicts = _verify(truth, rank, model, prepared)
                if verdicts is not None and variant.exact and not verdicts[0].passed:
                    return _failure(variant, verdicts)
                timing = _time(session, rank, model, prepared, options, loading_peak)
                records.append(
                    _record(
                        session, job, planned, variant, rank, verdicts, machine, timing, options
                    )
                )
                steps.append(rank.trace.last)
            if records[-1].tps < CLEARLY_SLOWER * max(record.tps for record in records):
                break
    finally:
        rank.arena.close()
    best, step = max(zip(records, steps, strict=True), key=lambda pair: pair[0].tps)
    searched = {record.plan: record.tps for record in records} if len(variants) > 1 else {}
    best = msgspec.structs.replace(best, searched=searched, repeat=repeat)
    timeline.add(best, step, rank.trace.clock)
    return best


def _verify(
    truth: Truth | None, rank: Rank, model: Model, prepared: Prepared
) -> tuple[Verdict, Verdict | None] | None:
    if truth is not None:
        return truth.judge(model, prepared)
    model.forward(prepared)
    return None


def _failure(plan: Plan, verdicts: tuple[Verdict, Verdict | None]) -> str:
    worst = verdicts[0].failed[0]
    text = (
        f"plan {plan} failed verification: {worst.name} is off by {worst.norm:.2e} "
        f"(worst row {worst.worst_row:.2e}), tolerance {worst.tolerance:.2e}"
    )
    alone = _error_of(verdicts[1], worst.name)
    return text if alone is None else f"{text}; one rank is off by {alone:.2e}"


def _error_of(verdict: Verdict | None, name: str) -> float | None:
    """Return the norm of one output's error."""
    if verdict is None:
        return None
    return next(error.norm for error in verdict.errors if error.name == name)


def _time(
    session: Session,
    rank: Rank,
    model: Model,
    prepared: Prepared,
    options: argparse.Namespace,
    loading_peak: int,
) -> Timing:
    rank.arena.restart_peak()  # verification holds copies of the branches; a step does not
    for _ in range(options.warmup):
        model.forward(prepared)
    blocks, steps = rank.arena.blocks, []
    for _ in range(options.iterations):
        session.barrier()
        rank.traffic.clear()
        rank.load.clear()
        model.forward(prepared)
        steps.append(rank.trace.last.times())
    if options.warmup and rank.arena.blocks != blocks:
        raise RuntimeError("the arena grew inside a timed step")
    typical = mean_times(steps)
    return Timing(
        [step.step for step in steps],
        typical.compute,
        typical.waits,
        typical.hidden,
        typical.overlap,
        max(loading_peak, rank.arena.peak_bytes),
        rank.traffic.sent,
        rank.traffic.received,
        rank.load.rows,
        rank.load.dropped.total(),
    )


def _record(
    session: Session,
    job: Job,
    planned: PlannedRun,
    plan: Plan,
    rank: Rank,
    verdicts: tuple[Verdict, Verdict | None] | None,
    machine: Machine,
    timing: Timing,
    options: argparse.Namespace,
) -> Record:
    everyone = session.world.gather_objects((timing, process_peak_bytes()))
    timings, process = zip(*everyone, strict=True)
    waits = [sum(t.waits.values()) for t in timings]
    bubbles = [t.waits.get("pp", 0.0) for t in timings]
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
    exposed = None if session.oversubscribed else max(waits) / step.median
    bubble = None if session.oversubscribed or plan.pp == 1 else max(bubbles) / step.median
    return Record(
        experiment=job.experiment,
        role=planned.role,
        plan=str(plan),
        ranks=session.size,
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
        roofline_fraction=roofline(job, session, machine) / step.median,
        oversubscribed=session.oversubscribed,
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
        published_tps=planned.published_tps,
        published_tpot_ms=planned.published_tpot_ms,
        environment=environment(
            cores=session.total_cores,
            isa=session.isa,
            threads=session.threads,
            mpi=session.mpi_library,
        ),
    )
