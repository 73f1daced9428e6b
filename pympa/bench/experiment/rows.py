"""Rows of an experiment's table with their plan and model for a number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

from pympa.bench.experiment.description import PlannedRun, Size
from pympa.plan.mesh import Plan
from pympa.plan.partition import Stages, stage_bounds
from pympa.plan.rules import check_plan

CACHE_FAMILIES = ("stages", "stages-tp")
"""Families whose chunks of rows are cut so that a layer's working set fits the cache."""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        planned: the row as the file describes it.
        plan: the plan for the number of ranks that the row uses.
        size: the model and the batch.
        stages: the layers of each stage.
    """

    planned: PlannedRun
    plan: Plan
    size: Size
    stages: Stages

    @property
    def cuts_to_cache(self) -> bool:
        """Whether micro-batches are cut so that their working set fits the cache."""
        return self.planned.family in CACHE_FAMILIES and self.plan.pp > 1


def resolve_row(
    planned: PlannedRun,
    size: Size,
    ranks: int,
    *,
    itemsize: int,
    limit_bytes: int | None = None,
    idle_allowed: bool = False,
) -> Row:
    """Return a row for a number of ranks. Local: every rank computes the same result.

    Args:
        planned: the row as the file describes it.
        size: the model and the batch.
        ranks: the number of ranks.
        itemsize: the bytes of one element of a weight.
        limit_bytes: the largest allowed bytes of weight matrices on any rank; None means no limit.
        idle_allowed: whether an explicit plan may use fewer ranks.

    Raises:
        ValueError: the row cannot run.
    """
    of_row = size.grown(planned.grow)
    plan = planned.resolve(of_row.model, ranks)
    if idle_allowed and planned.plan is not None and plan.world < ranks:
        ranks = plan.world
    check_plan(plan, of_row.model, ranks, of_row.batch, of_row.tokens_in_all)
    longest = max(of_row.lengths)
    stages = stage_bounds(of_row.model, plan, longest, itemsize=itemsize, limit_bytes=limit_bytes)
    return Row(planned, plan, of_row, stages)
