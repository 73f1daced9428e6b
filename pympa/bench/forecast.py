"""The simulated column of a measured table: the same rows at the paper's size on a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pympa.bench.experiment import Experiment, PlannedRun
from pympa.bench.predict import SimulatedRow, fastest, predict
from pympa.bench.record import Forecast
from pympa.bench.simulate import simulated_row
from pympa.cluster import Cluster, load_cluster
from pympa.errors import RefusedError
from pympa.rules import idle_ranks
from pympa.team import Team

DEFAULT_CLUSTER = "dgx-h100x2"
NO_CLUSTER = "none"
_MOST_RANKS = 64  # that a rank simulates in seconds, while the others wait

Planned = tuple[Experiment, PlannedRun]


def forecast_cluster(name: str | None) -> Cluster | None:
    """Return the cluster that --cluster names for a measured run, or None.

    Raises:
        SpecError: there is none of that name.
        RefusedError: it is too large to be simulated beside a measurement.
    """
    if name == NO_CLUSTER:
        return None
    cluster = load_cluster(DEFAULT_CLUSTER if name is None else name)
    if cluster.ranks > _MOST_RANKS:
        raise RefusedError(
            f"--cluster {name}: expected at most {_MOST_RANKS} ranks beside a measured run; it has "
            f"{cluster.ranks:,}; predict it with --backend virtual"
        )
    return cluster


def forecasts(
    team: Team, rows: Sequence[Planned], cluster: Cluster | None, dtype: str | None
) -> list[Forecast | None]:
    """Predict rows, a part of them on some ranks, and return them all on all ranks. Collective.

    Args:
        team: who works.
        rows: experiment and row.
        cluster: to predict; None predicts nothing.
        dtype: instead of the experiments'.

    Returns:
        For each row what comes out, or None where the experiment has no size of a paper, or where
        the plan does not take all of the cluster or cannot run on it.
    """
    if cluster is None:
        return [None for _ in rows]
    wanted = [_row(*row, cluster, dtype) for row in rows]
    different = [*dict.fromkeys(row for row in wanted if row is not None)]
    workers = min(team.size, team.cores)  # more would only take turns on a core
    share = different[team.rank :: workers] if team.rank < workers else []
    mine = {row: _forecast(*row, cluster) for row in share}
    team.rest()  # some rows take much longer than others
    found: dict[tuple[SimulatedRow, str], Forecast] = {}
    for of_rank in team.world.gather_objects(mine):
        found |= of_rank
    return [None if row is None else found[row] for row in wanted]


def _row(
    experiment: Experiment, planned: PlannedRun, cluster: Cluster, dtype: str | None
) -> tuple[SimulatedRow, str] | None:
    """Return what to predict of a row, without its role and figures: rows may be the same."""
    if "paper" not in experiment.sizes:
        return None
    dtype = dtype or experiment.dtype
    try:
        row = simulated_row(planned, experiment.sizes["paper"], dtype, cluster, None)
    except ValueError:
        return None  # a plan of another number of ranks, or one that this model cannot be cut by
    if planned.plan is not None and row.plan.world != cluster.ranks:
        return None
    searched = PlannedRun(role="", family=planned.family, plan=planned.plan)
    return replace(row, planned=searched), dtype


def _forecast(row: SimulatedRow, dtype: str, cluster: Cluster) -> Forecast:
    found = fastest(
        lambda plan: predict(row.size, plan, dtype, cluster, stages=row.stages),
        row,
        dtype,
        cluster,
    )
    return Forecast(
        cluster.title,
        str(found.plan),
        sum(row.size.lengths) / found.step_seconds,
        found.peak_bytes <= cluster.device.memory_bytes,
        idle_ranks(found.plan, row.size.lengths),
    )
