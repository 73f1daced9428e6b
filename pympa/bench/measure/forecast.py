"""The simulated column of a measured table: the same rows at the paper's size on a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pympa.bench.experiment.description import Experiment, PlannedRun
from pympa.bench.experiment.rows import Row
from pympa.bench.records.record import Forecast
from pympa.bench.simulate.rows import fastest, simulated_row
from pympa.costs.cluster import Cluster, load_cluster
from pympa.errors import RefusedError
from pympa.plan.rules import idle_ranks
from pympa.session.team import Team
from pympa.sim.predict import predict

DEFAULT_CLUSTER = "dgx-h100x2"
NO_CLUSTER = "none"
_MOST_RANKS = 64  # one rank simulates them in seconds, while the others wait

Planned = tuple[Experiment, PlannedRun]


def forecast_cluster(name: str | None) -> Cluster | None:
    """Return the cluster that --cluster names for a measured run, or None for no forecast.

    Raises:
        SpecError: no cluster has this name.
        RefusedError: the cluster is too large to be simulated beside a measurement.
    """
    if name == NO_CLUSTER:
        return None
    cluster = load_cluster(DEFAULT_CLUSTER if name is None else name)
    if cluster.ranks > _MOST_RANKS:
        raise RefusedError(
            f"--cluster {name}: expected at most {_MOST_RANKS} ranks beside a measured run; got "
            f"{cluster.ranks:,}; use --backend virtual to predict it"
        )
    return cluster


def forecasts(
    team: Team, rows: Sequence[Planned], cluster: Cluster | None, dtype: str | None
) -> list[Forecast | None]:
    """Predict rows, each on one of the ranks, and return all of them on all ranks. Collective.

    Args:
        team: the ranks that share the work.
        rows: the pairs of experiment and row.
        cluster: the cluster to predict; None predicts nothing.
        dtype: a dtype that replaces the experiments' own; None keeps them.

    Returns:
        The forecast of each row. It is None where the experiment has no "paper" size, or where
        the plan does not use all of the cluster or cannot run on it.
    """
    if cluster is None:
        return [None for _ in rows]
    wanted = [_row(*row, cluster, dtype) for row in rows]
    different = [*dict.fromkeys(row for row in wanted if row is not None)]
    workers = min(team.size, team.cores)  # more would only share the cores
    share = different[team.rank :: workers] if team.rank < workers else []
    mine = {row: _forecast(*row, cluster) for row in share}
    team.idle_barrier()  # some rows take much longer than others
    found: dict[tuple[Row, str], Forecast] = {}
    for of_rank in team.world.gather_objects(mine):
        found |= of_rank
    return [None if row is None else found[row] for row in wanted]


def _row(
    experiment: Experiment, planned: PlannedRun, cluster: Cluster, dtype: str | None
) -> tuple[Row, str] | None:
    """Return the row to predict and its dtype, without role and figures: equal rows are shared."""
    if "paper" not in experiment.sizes:
        return None
    dtype = dtype or experiment.dtype
    try:
        row = simulated_row(planned, experiment.sizes["paper"], dtype, cluster, None)
    except ValueError:
        return None  # the plan needs another number of ranks, or cannot split this model
    if planned.plan is not None and row.plan.world != cluster.ranks:
        return None
    searched = PlannedRun(role="", family=planned.family, plan=planned.plan)
    return replace(row, planned=searched), dtype


def _forecast(row: Row, dtype: str, cluster: Cluster) -> Forecast:
    found = fastest(
        lambda plan: predict(
            row.size.model, row.size.lengths, plan, dtype, cluster, stages=row.stages
        ),
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
