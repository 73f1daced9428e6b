"""Stop between two plans, and later continue with the missing ones."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from importlib.metadata import version
from types import FrameType

import msgspec

from pympa.bench.measure.candidate import Candidate
from pympa.bench.records.record import Record
from pympa.errors import RefusedError
from pympa.plan.mesh import Plan, parse_plan
from pympa.session.team import Team


class StopSignal:
    """Records SIGUSR1, on which all ranks agree between two plans."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._seen = False
        self.agreed = False
        signal.signal(signal.SIGUSR1, self._remember)

    def agree(self) -> bool:
        """Return whether any rank received SIGUSR1. Collective."""
        self.agreed = any(self._team.world.gather_objects(self._seen))
        return self.agreed

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._seen = True


def check_isa(earlier: Sequence[Record], team: Team) -> None:
    """Refuse to continue a file of another instruction set of CPUs: its results have other bits.

    Raises:
        RefusedError: a record is of another one.
    """
    for record in earlier:
        before = record.environment.isa
        if record.clock == "measured" and team.isa != before and "cuda" not in (team.isa, before):
            raise RefusedError(
                f"--resume: expected records of instruction set {team.isa}, which this job uses; "
                f"got {before}; continue with --isa {before}, or write another --output"
            )


def find_measured(
    earlier: Sequence[Record],
    candidates: Sequence[Candidate],
    team: Team,
    options: argparse.Namespace,
) -> dict[tuple[int, int], Record]:
    """Return the records of an earlier run that measured a (repeat, row) in the same way.

    The same way means equal: experiment, model, input, size, dtype, plan, stages, cache, ranks,
    threads, instruction set, shared memory, route between GPUs, warm-up, iterations, verification,
    and version of pympa; and joules are recorded if --energy asks for them.
    """
    found: dict[tuple[int, int], Record] = {}
    kinds = options.warmup, options.no_shared_memory, team.isa
    for record in earlier:
        same = (
            record.clock == "measured"
            and record.router_skew == options.router_skew
            and (record.error is None) is options.no_verify
            and record.step_seconds.iterations == options.iterations
            and record.environment.threads == team.threads
            and _route_name(record.environment.route) == _route_name(team.route)
            and (record.joules_per_token is not None or not options.energy)
            and record.environment.pympa == version("pympa")
        )
        for index, candidate in enumerate(candidates):
            same_job = record.job == candidate.job.digest(*kinds)
            if same and same_job and record.repeat <= options.repeat and _is_of(record, candidate):
                found[record.repeat, index] = record
    return found


def _route_name(route: str | None) -> str:
    """Return the route between GPUs without its reason, which may name a GPU of another node."""
    return (route or "").partition(":")[0]


def _is_of(record: Record, candidate: Candidate) -> bool:
    """Return whether a record belongs to this row, job and number of micro-batches."""
    row, job, stages = candidate.row, candidate.job, record.stages
    return (
        (record.experiment, record.dtype, record.role)
        == (job.experiment, job.dtype.name, row.planned.role)
        and (record.size, record.batch, record.tokens)
        == (job.size_name, job.size.batch, max(job.size.lengths))
        and record.ranks == row.plan.world
        and (stages is None or tuple(stages.layers) == row.stages)
        and (not row.cuts_to_cache or (stages and stages.cache_bytes) == candidate.cache_bytes)
        and _is_variant(record.plan, candidate.variants)
    )


def _is_variant(plan: str, variants: Sequence[Plan]) -> bool:
    parsed = parse_plan(plan)
    return parsed in variants or (
        len(variants) > 1
        and msgspec.structs.replace(parsed, micro_batches=1)
        == msgspec.structs.replace(variants[0], micro_batches=1)
    )
