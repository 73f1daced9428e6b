"""Does a plan fit: what its ranks need by rehearsal, and to check it, against what nodes have."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pympa.backend import Rehearsal
from pympa.bench.memory import memory_limits
from pympa.bench.oracle_cost import (
    compare_bytes,
    largest_weight,
    output_bytes,
    sampled_bytes,
    whole_bytes,
    whole_flops,
)
from pympa.bench.truth import WHOLE_ORACLE_FLOPS, Job
from pympa.layout import split_batch
from pympa.mesh import Mesh, Plan
from pympa.partition import Bounds
from pympa.session import Session
from pympa.team import Team

PROCESS_BYTES = 150 << 20  # interpreter, libraries and MPI of one rank, beside its arena
DEVICE_BYTES = 1 << 30  # what NCCL, cuBLASLt and the driver take of a GPU, generously
SEQUENCE_BYTES = 2000  # Python's objects for a sequence on a rank
_ID_BYTES = 2 * 4  # of a token of the batch on every rank, as ids are made
_ROW_BYTES = 24  # of a rank's token: its id, its position's row, and the positions

Check = Literal["whole", "sampled", "none"]
"""How a run is verified: all of it, rows of its last sequence, or not at all."""


def checks_of(job: Job, *, verifies: bool) -> tuple[Check, ...]:
    """Return the ways to verify a job, the best first; the first that fits will do."""
    if not verifies:
        return ("none",)
    long = whole_flops(job.size.model, job.size.lengths) > WHOLE_ORACLE_FLOPS
    return ("sampled",) if long else ("whole", "sampled")


def rehearsal(team: Team, job: Job, plan: Plan, stages: Bounds) -> Rehearsal:
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


class Need(NamedTuple):
    """Bytes of a rank at one time.

    host: in all. device: of its GPU. check: of those on the host, what is there to verify.
    """

    host: int
    device: int = 0
    check: int = 0


class Room:
    """What nodes, control groups and GPUs have left before anything is loaded. Collective to make.

    Args:
        session: its ranks use it.
    """

    def __init__(self, session: Session) -> None:
        limits, devices = memory_limits(), {}
        if session.accelerator is not None:
            device = session.accelerator.device
            devices[f"GPU {device.bus_id} of {next(iter(limits))}"] = device.memory()[0]
        self._host, self._device = [*limits], [*devices]
        everyone = session.world.gather_objects((limits, limits | devices))
        self._ranks = Counter(place for of_rank, _ in everyone for place in of_rank)
        self._present: dict[str, int] = {}
        for _, of_rank in everyone:
            for place, seen in of_rank.items():
                self._present[place] = min(seen, self._present.get(place, seen))

    def lacking_for_input(self, job: Job) -> str | None:
        """Say which place lacks the memory for the input alone, of all ranks, if any does."""
        for place, ranks in self._ranks.items():
            needed = ranks * _input_bytes(job)
            if needed > self._present[place]:
                return (
                    f"size {job.size_name} does not fit: {place} needs {needed:,} bytes for the "
                    f"input of its {ranks} ranks, {self._present[place]:,} are available; use "
                    "fewer ranks of a node, or another size"
                )
        return None

    def lacking(self, team: Team, job: Job, plan: Plan, stages: Bounds, check: Check) -> str | None:
        """Rehearse a plan on shapes and say which place lacks the memory, if any. Collective.

        Args:
            team: the ranks of the plan.
            job: model, batch and dtype.
            plan: the mesh.
            stages: layers of each stage.
            check: how it will be verified.
        """
        needs = _needs(team, job, plan, stages, check)
        everyone = team.world.gather_objects((self._host, self._device, needs))
        for moment in range(len(needs)):
            total: defaultdict[str, list[Need]] = defaultdict(list)
            for hosts, devices, of_rank in everyone:
                for place in hosts:
                    total[place].append(of_rank[moment])
                for place in devices:
                    total[place].append(Need(of_rank[moment].device))
            for place, of_place in total.items():
                resting = max(self._ranks[place] - len(of_place), 0)
                needed = sum(need.host for need in of_place) + resting * _input_bytes(job)
                if needed > self._present[place]:
                    return self._refusal(place, needed, of_place, job, plan)
        return None

    def _refusal(
        self, place: str, needed: int, of_place: Sequence[Need], job: Job, plan: Plan
    ) -> str:
        check = sum(need.check for need in of_place)
        verifying = f"; {check:,} of them to verify, without --no-verify" if check else ""
        return (
            f"plan {plan} at size {job.size_name} does not fit: {place} needs {needed:,} bytes "
            f"({max(need.host for need in of_place):,} on the largest rank{verifying}), "
            f"{self._present[place]:,} are available; use more nodes, another plan or another size"
        )


def _input_bytes(job: Job) -> int:
    """Return the bytes of a batch on each rank, whatever it has of it."""
    return _ID_BYTES * job.size.tokens_in_all + SEQUENCE_BYTES * job.size.batch


def _needs(team: Team, job: Job, plan: Plan, stages: Bounds, check: Check) -> tuple[Need, Need]:
    """Return what this rank needs while one rank is judged, and while the plan runs."""
    spec, itemsize, on_device = job.size.model, job.dtype.itemsize, team.accelerator is not None
    base, first = PROCESS_BYTES + _input_bytes(job), team.rank == 0
    if on_device:
        base += 2 * largest_weight(spec) * itemsize  # on its way there

    def need(arena: int, more: int, checking: int) -> Need:
        host, device = (0, arena + DEVICE_BYTES) if on_device else (arena, 0)
        return Need(base + more + checking + host, device, checking)

    alone = need(0, 0, 0)
    outputs = _collected_bytes(job, check)
    if check == "whole" and first:
        rehearsed = rehearsal_of_one(team, job)
        # A copy that a probe makes, its pickle, the bytes of it and what comes out of them.
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
    """Return the bytes of a run's outputs on rank 0."""
    spec, lengths = job.size.model, job.size.lengths
    if check == "none":
        return 0
    lengths = lengths if check == "whole" else lengths[-1:]
    logits = 4 * spec.vocabulary * len(lengths)
    return output_bytes(spec, sum(lengths), job.dtype.itemsize) + logits


def _checking_bytes(job: Job, check: Check, *, again: bool) -> int:
    """Return the bytes that judging a run takes beside its outputs.

    Args:
        job: model, batch and dtype.
        check: how.
        again: there is an oracle already, which serves unless experts were chosen otherwise.
    """
    spec, lengths, itemsize = job.size.model, job.size.lengths, job.dtype.itemsize
    if check == "none":
        return 0
    if check == "sampled":
        return sampled_bytes(spec, lengths[-1], itemsize)
    truth = output_bytes(spec, sum(lengths), 8) + 8 * spec.vocabulary * len(lengths)
    truths = 2 * truth if again and spec.has_experts else truth
    # Beside an oracle another is made: of other choices, or with rounding.
    making = whole_bytes(spec, lengths, itemsize)
    return truths + max(making, compare_bytes(spec, sum(lengths), len(lengths)))


def _rows(job: Job, plan: Plan, rank: int) -> int:
    """Return about the most rows that a rank has of the batch."""
    group = split_batch(job.size.lengths, plan.dp)[Mesh(plan, rank).coordinate("dp")]
    return group.rows // plan.cp + len(group.ranges)


def _own_outputs(job: Job, plan: Plan, rank: int, rehearsed: Rehearsal, check: Check) -> int:
    """Return the bytes of the outputs that a rank gives."""
    if check == "none" or Mesh(plan, rank).coordinate("columns"):
        return 0
    rows = _rows(job, plan, rank)
    if check == "sampled":
        rows = min(rows, job.size.lengths[-1] // plan.cp + 1)
    branches = 2 * len(rehearsed.model.layers) + 1
    return rows * branches * job.size.model.d_model * job.dtype.itemsize
