"""Candidates: the rows of an experiment that can be measured here, and the variants that fit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

from pympa.bench.experiment.rows import Row
from pympa.bench.measure.room import Check, checks_of, lacking, rehearsal
from pympa.bench.measure.truth import Job
from pympa.bench.records.record import Forecast
from pympa.footprint.working_set import fitting_chunk, micro_batches_within, most_rows, working_sets
from pympa.hardware.caches import cache_of_rank
from pympa.plan.mesh import Plan
from pympa.plan.micro_batches import doublings
from pympa.session.room import Room
from pympa.session.team import Team


@dataclass(frozen=True)
class Candidate:
    """A row that can be measured.

    Attributes:
        row: the row of the table.
        job: the job at the row's size.
        variants: the plan with different numbers of micro-batches; the first one fits into memory.
        room: the free memory, which decides whether another variant fits.
        check: the way to verify it.
        cache_bytes: the bytes of a rank's cache; None where they are not known.
        forecast: the simulated result of the row at the paper's size.
    """

    row: Row
    job: Job
    variants: tuple[Plan, ...]
    room: Room
    check: Check
    cache_bytes: int | None
    forecast: Forecast | None = None

    def fits(self, team: Team, variant: Plan) -> bool:
        """Return whether a variant fits into memory. Collective over the ranks of the plan."""
        if variant == self.variants[0]:
            return True
        short = lacking(team, self.room, self.job, variant, self.row.stages, self.check)
        return short is None


def agreed_cache(team: Team, asked: int | None) -> int | None:
    """Return the cache bytes of a rank, as requested or the least that was found. Collective.

    The result is None if some rank does not know its cache, or computes on a GPU.
    """
    found = cache_of_rank(team.threads) if team.accelerator is None else None
    caches = team.world.gather_objects(asked or found)
    return None if None in caches else min(caches)


def find_candidate(
    team: Team, job: Job, row: Row, room: Room, cache_bytes: int | None, *, verifies: bool
) -> Candidate | str:
    """Return the candidate of a row, or the reason why nothing fits into memory. Collective.

    The job needs no input yet, because only shapes count.

    A family with stages does not fix the number of micro-batches. The variants are then powers of
    two; where chunks are cut to fit the cache, they are the fewest that fit, times powers of two.
    """
    variants = [row.plan]
    if row.planned.family is not None and row.plan.pp > 1:
        fewest = 1
        if row.cuts_to_cache and cache_bytes is not None:
            fewest = team.on_first(
                row.plan.world, lambda team: _fewest_within(team, job, row, cache_bytes)
            )
        variants = doublings(row.plan, job.size.model, job.size.lengths, fewest)
    short: str | None = None
    checks = checks_of(job, verifies=verifies)
    for (index, variant), check in itertools.product(enumerate(variants), checks):
        rehearse = partial(
            lacking, room=room, job=job, plan=variant, stages=row.stages, check=check
        )
        short = team.on_first(row.plan.world, rehearse)
        if short is None:
            return Candidate(row, job, tuple(variants[index:]), room, check, cache_bytes)
    return str(short)


def _fewest_within(team: Team, job: Job, row: Row, cache_bytes: int) -> int:
    """Return the fewest micro-batches whose working set fits the cache on all ranks. Collective."""
    spec, lengths = job.size.model, job.size.lengths
    measure = working_sets(rehearsal(team, job, row.plan, row.stages))
    chunk = fitting_chunk(measure, cache_bytes, most_rows(row.plan, lengths, 1))
    return micro_batches_within(row.plan, spec, lengths, min(team.world.gather_objects(chunk)))
