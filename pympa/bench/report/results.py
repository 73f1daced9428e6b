"""Rows of result tables as plain data, without layout."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pympa.bench.experiment.rows import Row
from pympa.bench.records.record import Forecast, Record
from pympa.costs.cluster import Cluster
from pympa.plan.accounting import step_flops
from pympa.plan.rules import idle_ranks
from pympa.sim.predict import Prediction


class Statistic(NamedTuple):
    """The median of some values, the least, the largest, and the number of values."""

    median: float
    least: float
    most: float
    values: int


@dataclass(frozen=True)
class Result:
    """One plan of an experiment, measured once or several times.

    Attributes:
        record: the record of median speed.
        tps: the tokens/s of all repeats.
        ratio: the speed over the baseline's of the same repeat, in useful flops/s, which is fair
            to a model that grows with the ranks; None without a baseline.
        published_ratio: the printed tokens/s over the baseline's; None if either is not printed.
        forecast: the simulated result at the paper's size; None without a simulation.
        forecast_ratio: the simulated tokens/s over the baseline's; None without a baseline.
        bytes_sent: the bytes of messages of all ranks in a step.
        bytes_read: the bytes of keys and values that ranks read from other ranks' memory in a step.
    """

    record: Record
    tps: Statistic
    ratio: Statistic | None
    published_ratio: float | None
    forecast: Forecast | None
    forecast_ratio: float | None
    bytes_sent: float
    bytes_read: float


def measured_results(rows: Sequence[Sequence[Record]], *, scales: bool) -> list[Result]:
    """Return the results of an experiment.

    Args:
        rows: the records of each plan, one for each repeat.
        scales: whether rows differ in their ranks; they are then compared with the row of the
            fewest ranks, not with the baseline.
    """
    baseline = next((records for records in rows if records[0].role == "baseline"), None)
    if scales:
        baseline = min(rows, key=lambda records: records[0].ranks)
    return [_result(records, baseline) for records in rows]


def _result(records: Sequence[Record], baseline: Sequence[Record] | None) -> Result:
    typical = sorted(records, key=lambda record: record.tps)[(len(records) - 1) // 2]
    base = None if baseline is None else baseline[0]
    slow = {record.repeat: _work(record) for record in baseline or ()}
    ratios = [_work(record) / slow[record.repeat] for record in records if record.repeat in slow]
    published = None
    if base is not None and typical.published_tps and base.published_tps:
        published = typical.published_tps / base.published_tps
    forecast_ratio = None
    if typical.forecast and base is not None and base.forecast:
        forecast_ratio = typical.forecast.simulated_tps / base.forecast.simulated_tps
    read = typical.bytes_read
    return Result(
        typical,
        _statistic([record.tps for record in records]),
        _statistic(ratios) if ratios else None,
        published,
        typical.forecast,
        forecast_ratio,
        sum(typical.bytes_sent.by_rank),
        0 if read is None else sum(read.by_rank),
    )


def _work(record: Record) -> float:
    """Return the useful flops/s."""
    return record.tps * record.flops_per_token


def _statistic(values: Sequence[float]) -> Statistic:
    return Statistic(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class SimulatedResult:
    """The simulated result of one plan of an experiment on a cluster.

    Attributes:
        row: the row of the table.
        prediction: the simulator's result.
        tps: the simulated tokens/s.
        possible_tps: the tokens/s if all ranks did useful flops at the data sheet's peak.
        ratio: the useful flops/s over the baseline's.
        published_ratio: the printed tokens/s over the baseline's; None if either is not printed.
        waiting: the share of the step in which the rank that waits most waits.
        fits: whether the ranks' peaks fit into the devices' memory.
        joules_per_token: the board power × the time in kernels, of all ranks, for each token.
        idle_ranks: the number of ranks that hold no token.
    """

    row: Row
    prediction: Prediction
    tps: float
    possible_tps: float
    ratio: float
    published_ratio: float | None
    waiting: float
    fits: bool
    joules_per_token: float
    idle_ranks: int


def simulated_results(
    rows: Sequence[tuple[Row, Prediction]], dtype: str, cluster: Cluster
) -> list[SimulatedResult]:
    """Return the results of an experiment on a cluster.

    Args:
        rows: the rows and their predictions.
        dtype: the dtype of weights and activations.
        cluster: the cluster of the predictions.
    """
    base = next((pair for pair in rows if pair[0].planned.role == "baseline"), rows[0])
    found = []
    for row, prediction in rows:
        lengths = row.size.lengths
        tokens, flops = sum(lengths), step_flops(row.size.model, lengths)
        peak = cluster.device.flops_per_second[dtype] * prediction.plan.world
        published, of_base = row.planned.published_tps, base[0].planned.published_tps
        found.append(
            SimulatedResult(
                row,
                prediction,
                tokens / prediction.step_seconds,
                tokens * peak / flops,
                _useful(row, prediction) / _useful(*base),
                published / of_base if published and of_base else None,
                prediction.waiting_seconds / prediction.step_seconds,
                prediction.peak_bytes <= cluster.device.memory_bytes,
                prediction.joules / tokens,
                idle_ranks(prediction.plan, lengths),
            )
        )
    return found


def _useful(row: Row, prediction: Prediction) -> float:
    """Return the useful flops/s."""
    return step_flops(row.size.model, row.size.lengths) / prediction.step_seconds
