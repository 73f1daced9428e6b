"""What of an experiment can be measured here: rows, their plans, and the variants that fit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import msgspec

from pympa.bench.experiment import PlannedRun, Size
from pympa.bench.record import Forecast
from pympa.bench.room import Check, Room, checks_of, rehearsal
from pympa.bench.truth import Job
from pympa.caches import cache_of_rank
from pympa.mesh import Plan
from pympa.partition import Bounds
from pympa.session import Session
from pympa.team import Team
from pympa.working_set import fitting_chunk, micro_batches_within, most_rows, working_sets

MOST_MICRO_BATCHES = 128
CACHE_FAMILIES = ("stages", "stages-tp")
"""Families whose chunks of rows are cut so that a layer's working set fits the cache."""


@dataclass(frozen=True)
class Row:
    """One row of an experiment's table on this job.

    Attributes:
        planned: the row as the file has it. plan: for the ranks that it takes.
        size: model and batch. stages: layers of each stage.
        forecast: what is simulated of the row at the paper's size.
    """

    planned: PlannedRun
    plan: Plan
    size: Size
    stages: Bounds
    forecast: Forecast | None = None

    @property
    def cuts_to_cache(self) -> bool:
        """Micro-batches are as small as the cache asks for."""
        return self.planned.family in CACHE_FAMILIES and self.plan.pp > 1


@dataclass(frozen=True)
class Candidate:
    """A row that can be measured.

    Attributes:
        row: of the table. job: at its size.
        variants: of its plan, in micro-batches; the first one fits into memory.
        room: tells whether another one does.
        check: how it can be verified, or is not.
        cache_bytes: of a rank; None where it is not known.
    """

    row: Row
    job: Job
    variants: tuple[Plan, ...]
    room: Room
    check: Check
    cache_bytes: int | None

    def fits(self, team: Team, variant: Plan) -> bool:
        """Tell whether a variant fits into memory. Collective, of the ranks of the plan."""
        if variant == self.variants[0]:
            return True
        return self.room.lacking(team, self.job, variant, self.row.stages, self.check) is None


def agreed_cache(session: Session, asked: int | None) -> int | None:
    """Return the cache that a rank may call its own: as asked for, or the least found. Collective.

    None if some rank cannot tell, or computes on a GPU.
    """
    found = cache_of_rank(session.threads) if session.accelerator is None else None
    caches = session.world.gather_objects(asked or found)
    return None if None in caches else min(caches)


def find_candidate(
    session: Session, job: Job, row: Row, room: Room, cache_bytes: int | None, *, verifies: bool
) -> Candidate | str:
    """Return what can be measured of a row, or why nothing fits into memory. Collective.

    Only shapes count: the job needs no input yet.

    A family with stages leaves the number of micro-batches open: powers of two are variants, or,
    where chunks are cut to the cache, the fewest that do it times powers of two.
    """
    variants = [row.plan]
    if row.planned.family is not None and row.plan.pp > 1:
        fewest = 1
        if row.cuts_to_cache and cache_bytes is not None:
            fewest = session.on_first(
                row.plan.world, lambda team: _fewest_within(team, job, row, cache_bytes)
            )
        parts = sum(job.size.lengths) if job.size.model.causal else job.size.batch
        most = max(min(MOST_MICRO_BATCHES, parts), fewest)
        counts = [fewest << i for i in range((most // fewest).bit_length())]
        variants = [msgspec.structs.replace(row.plan, micro_batches=count) for count in counts]
    lacking: str | None = None
    checks = checks_of(job, verifies=verifies)
    for (index, variant), check in itertools.product(enumerate(variants), checks):
        rehearse = partial(room.lacking, job=job, plan=variant, stages=row.stages, check=check)
        lacking = session.on_first(row.plan.world, rehearse)
        if lacking is None:
            return Candidate(row, job, tuple(variants[index:]), room, check, cache_bytes)
    return str(lacking)


def _fewest_within(team: Team, job: Job, row: Row, cache_bytes: int) -> int:
    """Return the fewest micro-batches whose working set fits the cache on all ranks. Collective."""
    spec, lengths = job.size.model, job.size.lengths
    measure = working_sets(rehearsal(team, job, row.plan, row.stages))
    chunk = fitting_chunk(measure, cache_bytes, most_rows(row.plan, lengths, 1))
    return micro_batches_within(row.plan, spec, lengths, min(team.world.gather_objects(chunk)))
