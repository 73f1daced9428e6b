"""One plan of one job: check that it fits, verify it, then time it."""

from __future__ import annotations

import argparse
import platform
from collections import Counter
from dataclasses import dataclass

import msgspec

from pympa import _core
from pympa.accounting import roofline_seconds, step_flops
from pympa.bench.experiment import PlannedRun
from pympa.bench.memory import available_bytes, process_peak_bytes, reset_process_peak
from pympa.bench.record import Record, by_rank, environment, spread
from pympa.bench.truth import Job, Truth
from pympa.mesh import Plan
from pympa.model import Model, Prepared
from pympa.rank import Rank, rehearse
from pympa.session import RefusedError, Session
from pympa.verify import Verdict

SEARCHED_MICRO_BATCHES = (1, 2, 4, 8)
_PEAK_SECONDS = 0.05
_BANDWIDTH_BYTES = 256 << 20


@dataclass(frozen=True)
class Machine:
    """What one core can do, measured in this run: flop/s and bytes/s read."""

    flops_per_second: float
    bytes_per_second: float


def measure_machine(session: Session, dtype: str) -> Machine:
    """Measure one core on rank 0 while the others wait. Collective."""
    machine = None
    if session.rank == 0:
        machine = Machine(
            _core.fma_peak(dtype=dtype, isa=session.isa, seconds=_PEAK_SECONDS),
            _core.read_bandwidth(bytes=_BANDWIDTH_BYTES, seconds=_PEAK_SECONDS),
        )
    measured: Machine = session.world.gather_objects(machine)[0]
    return measured


def check_memory(session: Session, job: Job, plan: Plan) -> None:
    """Rehearse the plan on shapes and refuse it if a node lacks the memory. Collective.

    Raises:
        RefusedError: with the bytes needed and present.
    """
    needed = rehearse(
        job.size.model,
        plan,
        session.rank,
        job.size.lengths,
        job.dtype,
        isa=session.isa,
        threads=session.threads,
    ).arena.peak_bytes
    everyone = session.world.gather_objects((platform.node(), needed, available_bytes()))
    total: Counter[str] = Counter()
    present: dict[str, int] = {}
    for node, peak, available in everyone:
        total[node] += peak
        present[node] = min(available, present.get(node, available))
    for node in total:
        if total[node] > present[node]:
            raise RefusedError(
                f"{job.experiment} at size {job.size_name}, plan {plan}: node {node} needs "
                f"{total[node]:,} bytes ({max(p for _, p, _ in everyone):,} on the largest rank); "
                f"{present[node]:,} are available. Use more nodes, another plan or --size local"
            )


def run_plan(
    session: Session,
    job: Job,
    planned: PlannedRun,
    plan: Plan,
    truth: Truth | None,
    machine: Machine,
    options: argparse.Namespace,
) -> Record | str:
    """Verify and time one plan. Collective.

    Returns:
        The record, or why it failed verification.
    """
    check_memory(session, job, plan)
    reset_process_peak()
    rank = session.on(plan)
    try:
        model = rank.model(job.size.model, job.dtype, job.source)
        records: list[Record] = []
        for count in _micro_batches(job, planned, plan):
            with rank.arena.scope():
                variant = msgspec.structs.replace(plan, micro_batches=count)
                prepared = model.prepare(job.ids, count)
                verdicts = _verify(truth, rank, model, prepared)
                if verdicts is not None and not verdicts[0].passed:
                    return _failure(variant, verdicts)
                seconds, compute, waits = _time(session, rank, model, prepared, options)
                records.append(
                    _record(
                        session,
                        job,
                        planned,
                        variant,
                        rank,
                        verdicts,
                        machine,
                        (seconds, compute, waits),
                    )
                )
    finally:
        rank.arena.close()
    best = max(records, key=lambda record: record.tps)
    return msgspec.structs.replace(best, searched={r.plan: r.tps for r in records})


def _micro_batches(job: Job, planned: PlannedRun, plan: Plan) -> list[int]:
    """Return the numbers of micro-batches to try: searched where a family leaves them open."""
    if planned.family is None or plan.pp == 1:
        return [plan.micro_batches]
    most = job.size.tokens * job.size.batch if job.size.model.causal else job.size.batch
    return [count for count in SEARCHED_MICRO_BATCHES if count <= most]


def _verify(
    truth: Truth | None, rank: Rank, model: Model, prepared: Prepared
) -> tuple[Verdict, Verdict] | None:
    rank.traffic.clear()
    if truth is not None:
        return truth.judge(model, prepared)
    model.forward(prepared)
    return None


def _failure(plan: Plan, verdicts: tuple[Verdict, Verdict]) -> str:
    worst, alone = verdicts[0].failed[0], {e.name: e for e in verdicts[1].errors}
    one = alone[worst.name]
    return (
        f"plan {plan} failed verification: {worst.name} is off by {worst.norm:.2e} "
        f"(worst row {worst.worst_row:.2e}), tolerance {worst.tolerance:.2e}; "
        f"one rank is off by {one.norm:.2e} (worst row {one.worst_row:.2e})"
    )


def _time(
    session: Session, rank: Rank, model: Model, prepared: Prepared, options: argparse.Namespace
) -> tuple[list[float], float, dict[str, float]]:
    """Return this rank's seconds of each step, and its mean computing and waiting by axis."""
    for _ in range(options.warmup):
        model.forward(prepared)
    blocks, seconds = rank.arena.blocks, []
    rank.trace.clear()
    for _ in range(options.iterations):
        session.barrier()
        start = rank.trace.clock()
        model.forward(prepared)
        seconds.append(rank.trace.clock() - start)
    if options.warmup and rank.arena.blocks != blocks:
        raise RuntimeError("the arena grew inside a timed step")
    waits = rank.trace.seconds_by_name("wait")
    steps = options.iterations
    return (
        seconds,
        rank.trace.seconds("compute") / steps,
        {axis: total / steps for axis, total in waits.items()},
    )


def _record(
    session: Session,
    job: Job,
    planned: PlannedRun,
    plan: Plan,
    rank: Rank,
    verdicts: tuple[Verdict, Verdict] | None,
    machine: Machine,
    timing: tuple[list[float], float, dict[str, float]],
) -> Record:
    seconds, compute, waits = timing
    everyone = session.world.gather_objects(
        (
            seconds,
            compute,
            sum(waits.values()),
            waits.get("pp", 0.0),
            rank.traffic.sent,
            rank.traffic.received,
            rank.arena.peak_bytes,
            process_peak_bytes(),
        )
    )
    all_seconds, computes, all_waits, bubbles, sent, received, peaks, process = zip(
        *everyone, strict=True
    )
    spec, lengths = job.size.model, job.size.lengths
    step = spread([max(iteration) for iteration in zip(*all_seconds, strict=True)])
    by_axis: Counter[str] = Counter()
    for counts in sent:
        for (axis, _), count in counts.items():
            by_axis[axis] += count
    ideal = roofline_seconds(
        spec,
        lengths,
        job.dtype.itemsize,
        flops_per_second=machine.flops_per_second,
        bytes_per_second=machine.bytes_per_second,
        cores=min(session.size * session.threads, session.total_cores),
    )
    worst = verdicts[0].worst if verdicts else None
    alone = {e.name: e.norm for e in verdicts[1].errors} if verdicts else {}
    exposed = None if session.oversubscribed else max(all_waits) / step.median
    bubble = None if session.oversubscribed or plan.pp == 1 else max(bubbles) / step.median
    return Record(
        experiment=job.experiment,
        role=planned.role,
        plan=str(plan),
        ranks=session.size,
        dtype=job.dtype.name,
        size=job.size_name,
        batch=job.size.batch,
        tokens=job.size.tokens,
        tps=sum(lengths) / step.median,
        tpot_ms=1e3 * step.median / sum(lengths),
        step_seconds=step,
        compute_seconds=by_rank(list(computes)),
        comm_seconds=by_rank(list(all_waits)),
        comm_fraction=exposed,
        bubble_fraction=bubble,
        bytes_sent=by_rank([sum(counts.values()) for counts in sent]),
        bytes_received=by_rank([sum(counts.values()) for counts in received]),
        bytes_sent_by_axis=dict(by_axis),
        peak_bytes=by_rank(list(peaks)),
        process_peak_bytes=by_rank(list(process)),
        flops_per_token=step_flops(spec, lengths) / sum(lengths),
        roofline_fraction=ideal / step.median,
        oversubscribed=session.oversubscribed,
        error=worst.norm if worst else None,
        tolerance=worst.tolerance if worst else None,
        error_of=worst.name if worst else None,
        error_one_rank=alone.get(worst.name) if worst else None,
        sampled_rows=verdicts[0].sampled_rows if verdicts else None,
        verified=verdicts is not None,
        searched={},
        published_tps=planned.published_tps,
        published_tpot_ms=planned.published_tpot_ms,
        environment=environment(
            cores=session.total_cores,
            isa=session.isa,
            threads=session.threads,
            mpi=session.library,
        ),
    )
