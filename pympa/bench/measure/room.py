"""Does a plan fit into memory? Compare the rehearsed need of its ranks with what nodes have."""

from __future__ import annotations

from typing import Literal

from pympa.bench.measure.truth import WHOLE_ORACLE_FLOPS, Job
from pympa.footprint.rehearsal import Rehearsal
from pympa.hardware.memory import DEVICE_BYTES, PROCESS_BYTES
from pympa.plan.layout import split_batch
from pympa.plan.mesh import Mesh, Plan
from pympa.plan.partition import Stages
from pympa.session.room import Need, Room, Shortage
from pympa.session.team import Team
from pympa.verify.oracle_cost import (
    compare_bytes,
    largest_weight,
    output_bytes,
    sampled_bytes,
    whole_bytes,
    whole_flops,
)

SEQUENCE_BYTES = 2000  # Python objects of one sequence on a rank
_ID_BYTES = 2 * 4  # one token id of the batch, on every rank, while ids are made
_ROW_BYTES = 24  # one token of a rank: its id, the row of its position, and its position

Check = Literal["whole", "sampled", "none"]
"""The way to verify a run: all of it, some rows of its last sequence, or nothing."""


def checks_of(job: Job, *, verifies: bool) -> tuple[Check, ...]:
    """Return the ways to verify a job, the best first; the first one that fits is used."""
    if not verifies:
        return ("none",)
    long = whole_flops(job.size.model, job.size.lengths) > WHOLE_ORACLE_FLOPS
    return ("sampled",) if long else ("whole", "sampled")


def rehearsal(team: Team, job: Job, plan: Plan, stages: Stages) -> Rehearsal:
    """Return a rehearsal of this rank's part of a job."""
    return Rehearsal(
        job.size.model,
        plan,
        team.rank,
        job.dtype,
        isa=team.isa,
        threads=team.threads,
        stages=stages,
        reaches=team.reaches,
        accelerator=team.accelerator,
    )


def lacking_for_input(room: Room, job: Job) -> str | None:
    """Return a message if a memory is too small for the input of all its ranks, or None."""
    for pool, ranks in room.ranks.items():
        needed = ranks * _input_bytes(job)
        if needed > room.present[pool]:
            return (
                f"size {job.size_name} does not fit: {pool} needs {needed:,} bytes for the "
                f"input of its {ranks} ranks, {room.present[pool]:,} are available; use "
                "fewer ranks on each node, or another size"
            )
    return None


def lacking(
    team: Team, room: Room, job: Job, plan: Plan, stages: Stages, check: Check
) -> str | None:
    """Rehearse a plan on shapes; return a message if a memory is too small. Collective.

    Args:
        team: the ranks of the plan.
        room: the free memory.
        job: the model, batch and dtype.
        plan: the plan.
        stages: the layers of each stage.
        check: the way to verify it.
    """
    found = room.shortage(team, _needs(team, job, plan, stages, check), _input_bytes(job))
    return None if found is None else _refusal(found, job, plan)


def _refusal(found: Shortage, job: Job, plan: Plan) -> str:
    check = sum(need.check for need in found.needs)
    verifying = f"; {check:,} of them for verification, see --no-verify" if check else ""
    return (
        f"plan {plan} at size {job.size_name} does not fit: {found.pool} needs {found.needed:,} "
        f"bytes ({max(need.host for need in found.needs):,} on the largest rank{verifying}), "
        f"{found.available:,} are available; use more nodes, another plan or another size"
    )


def _input_bytes(job: Job) -> int:
    """Return the bytes of a batch on each rank, which holds all token ids."""
    return _ID_BYTES * job.size.tokens_in_all + SEQUENCE_BYTES * job.size.batch


def _needs(team: Team, job: Job, plan: Plan, stages: Stages, check: Check) -> tuple[Need, Need]:
    """Return the needs of this rank while one rank alone is judged, and while the plan runs."""
    spec, itemsize, on_device = job.size.model, job.dtype.itemsize, team.accelerator is not None
    base, first = PROCESS_BYTES + _input_bytes(job), team.rank == 0
    if on_device:
        base += 2 * largest_weight(spec) * itemsize  # weights are generated here and then copied

    def need(arena: int, more: int, checking: int) -> Need:
        host, device = (0, arena + DEVICE_BYTES) if on_device else (arena, 0)
        return Need(base + more + checking + host, device, checking)

    alone = need(0, 0, 0)
    outputs = _collected_bytes(job, check)
    if check == "whole" and first:
        rehearsed = rehearsal_of_one(team, job)
        # The copy that a probe makes, its pickled form, those bytes in a message, and the result.
        most = max(4 * outputs, outputs + _checking_bytes(job, check, again=False))
        alone = need(rehearsed.arena.mapped_bytes, 0, most)
    rehearsed = rehearsal(team, job, plan, stages)
    rehearsed.step(job.size.lengths)
    rows = _rows(job, plan, team.rank)
    share = 2 * _own_outputs(job, plan, team.rank, rehearsed, check)
    if first:
        share += max(2 * outputs, outputs + _checking_bytes(job, check, again=True))
    return alone, need(rehearsed.arena.mapped_bytes, _ROW_BYTES * rows, share)


def rehearsal_of_one(team: Team, job: Job) -> Rehearsal:
    """Return a rehearsed step of the job on one rank."""
    alone = Rehearsal(
        job.size.model,
        Plan(),
        0,
        job.dtype,
        isa=team.isa,
        threads=team.threads,
        accelerator=team.accelerator,
    )
    alone.step(job.size.lengths)
    return alone


def _collected_bytes(job: Job, check: Check) -> int:
    """Return the bytes of a run's outputs that rank 0 collects."""
    spec, lengths = job.size.model, job.size.lengths
    if check == "none":
        return 0
    lengths = lengths if check == "whole" else lengths[-1:]
    logits = 4 * spec.vocabulary * len(lengths)
    return output_bytes(spec, sum(lengths), job.dtype.itemsize) + logits


def _checking_bytes(job: Job, check: Check, *, again: bool) -> int:
    """Return the bytes that judging a run needs in addition to its outputs.

    Args:
        job: the model, batch and dtype.
        check: the way to verify it.
        again: whether an oracle exists; it is reused unless the run chose other experts.
    """
    spec, lengths, itemsize = job.size.model, job.size.lengths, job.dtype.itemsize
    if check == "none":
        return 0
    if check == "sampled":
        return sampled_bytes(spec, lengths[-1], itemsize)
    truth = output_bytes(spec, sum(lengths), 8) + 8 * spec.vocabulary * len(lengths)
    truths = 2 * truth if again and spec.has_experts else truth
    # A second oracle is made next to the first: for other choices of experts, or with rounding.
    making = whole_bytes(spec, lengths, itemsize)
    return truths + max(making, compare_bytes(spec, sum(lengths), len(lengths)))


def _rows(job: Job, plan: Plan, rank: int) -> int:
    """Return an estimate of the largest number of rows of the batch on a rank."""
    group = split_batch(job.size.lengths, plan.dp)[Mesh(plan, rank).coordinate("dp")]
    return group.rows // plan.cp + len(group.ranges)


def _own_outputs(job: Job, plan: Plan, rank: int, rehearsed: Rehearsal, check: Check) -> int:
    """Return the bytes of the outputs that a rank contributes."""
    if check == "none" or Mesh(plan, rank).coordinate("columns"):
        return 0
    rows = _rows(job, plan, rank)
    if check == "sampled":
        rows = min(rows, job.size.lengths[-1] // plan.cp + 1)
    branches = 2 * len(rehearsed.model.layers) + 1
    return rows * branches * job.size.model.d_model * job.dtype.itemsize
