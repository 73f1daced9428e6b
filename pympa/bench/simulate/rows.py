"""Rows that can be simulated on a cluster, and their fastest number of micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pympa.bench.experiment.description import PlannedRun, Size
from pympa.bench.experiment.rows import Row, resolve_row
from pympa.costs.cluster import Cluster
from pympa.costs.device_costs import costs_of
from pympa.footprint.rehearsal import Rehearsal
from pympa.kernels.cpu import isa_of_profile
from pympa.plan.mesh import Plan
from pympa.plan.micro_batches import doublings, try_until_slower
from pympa.sim.predict import Prediction
from pympa.spec import numpy_dtype


def simulated_rows(
    runs: Sequence[PlannedRun], size: Size, dtype: str, limit_bytes: int | None, cluster: Cluster
) -> tuple[list[Row], list[str]]:
    """Return rows for the runs that fit the cluster, and the reasons why others do not."""
    rows, refused = [], []
    for planned in runs:
        try:
            rows.append(simulated_row(planned, size, dtype, cluster, limit_bytes))
        except ValueError as error:
            refused.append(str(error))
    return rows, [*dict.fromkeys(refused)]


def simulated_row(
    planned: PlannedRun, size: Size, dtype: str, cluster: Cluster, limit_bytes: int | None
) -> Row:
    """Return one row, after checking that its plan can run on the cluster.

    An explicit plan may leave ranks of the cluster idle.

    Raises:
        ValueError: the plan cannot run on the cluster.
    """
    row = resolve_row(
        planned,
        size,
        planned.ranks or cluster.ranks,
        itemsize=numpy_dtype(dtype).itemsize,
        limit_bytes=limit_bytes,
        idle_allowed=True,
    )
    costs_of(cluster.device, dtype, row.plan.world)  # raises for a dtype without figures
    return row


def fastest(
    run: Callable[[Plan], Prediction], row: Row, dtype: str, cluster: Cluster
) -> Prediction:
    """Return the prediction of the fastest number of micro-batches, if a family leaves it open.

    The numbers are powers of two, from the fewest that fit into the devices' memory. With stages,
    more are tried until they are clearly slower.

    Args:
        run: a function that predicts a plan of the row.
        row: the row of a table.
        dtype: the dtype of weights and activations.
        cluster: the cluster with the devices' memory.
    """
    if row.planned.family is None:
        return run(row.plan)
    variants = doublings(row.plan, row.size.model, row.size.lengths)
    fitting = (i for i, variant in enumerate(variants) if _fits(row, variant, dtype, cluster))
    first = next(fitting, 0)
    last = len(variants) if row.plan.pp > 1 else first + 1
    tried = try_until_slower(variants[first:last], run, lambda found: found.step_seconds)
    return min(tried, key=lambda found: found.step_seconds)


def _fits(row: Row, plan: Plan, dtype: str, cluster: Cluster) -> bool:
    """Return whether the first ranks of the first and the last stage have enough memory."""
    costs = costs_of(cluster.device, dtype, plan.world)
    isa = isa_of_profile(cluster.isa)
    for rank in {0, plan.world - plan.stage_ranks}:
        rehearsal = Rehearsal(
            row.size.model,
            plan,
            rank,
            numpy_dtype(dtype),
            isa=isa,
            stages=row.stages,
            costs=costs,
        )
        rehearsal.step(row.size.lengths)
        if rehearsal.arena.peak_bytes > cluster.device.memory_bytes:
            return False
    return True
