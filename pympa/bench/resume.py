"""Stop between plans, and go on with what is missing."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from importlib.metadata import version
from types import FrameType

import msgspec

from pympa.bench.candidate import Candidate
from pympa.bench.record import Record
from pympa.mesh import Plan, parse_plan
from pympa.session import Session


class StopSignal:
    """Remembers SIGUSR1, until all ranks have agreed on it between two plans."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._seen = False
        self.agreed = False
        signal.signal(signal.SIGUSR1, self._remember)

    def agree(self) -> bool:
        """Tell whether any rank was asked to stop. Collective."""
        self.agreed = any(self._session.world.gather_objects(self._seen))
        return self.agreed

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._seen = True


def find_measured(
    earlier: Sequence[Record],
    candidates: Sequence[Candidate],
    session: Session,
    options: argparse.Namespace,
) -> dict[tuple[int, int], Record]:
    """Return which (repeat, row) an earlier run has measured in the same way.

    The same way: experiment, model, input, size, dtype, plan, stages, cache, ranks, threads,
    instruction set, shared memory, way between GPUs, warm-up, iterations, verified or not, joules
    where asked for, version of pympa.
    """
    found: dict[tuple[int, int], Record] = {}
    for record in earlier:
        same = (
            record.clock == "measured"
            and record.router_skew == options.router_skew
            and (record.error is None) is options.no_verify
            and record.step_seconds.iterations == options.iterations
            and record.environment.threads == session.threads
            and record.environment.isa == session.isa
            and _way(record.environment.route) == _way(session.route)
            and (record.joules_per_token is not None or not options.energy)
            and record.environment.pympa == version("pympa")
        )
        for index, candidate in enumerate(candidates):
            same_job = record.job == candidate.job.digest(options.warmup, options.no_shared_memory)
            if same and same_job and record.repeat <= options.repeat and _is_of(record, candidate):
                found[record.repeat, index] = record
    return found


def _way(route: str | None) -> str:
    """Return the way between GPUs without the reason, which may name a GPU of another node."""
    return (route or "").partition(":")[0]


def _is_of(record: Record, candidate: Candidate) -> bool:
    """Tell whether a record is of this row, job and way of cutting."""
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
