"""Predict experiments on a cluster that is not here: the same strategies on virtual clocks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pympa.accounting import step_flops
from pympa.backend import build_virtual_rank
from pympa.bench.experiment import PlannedRun, Size, load_experiment, packaged_experiments
from pympa.bench.table import console
from pympa.cluster import Cluster, load_cluster, packaged_clusters
from pympa.costs import Costs
from pympa.errors import RefusedError
from pympa.kernels.cpu import supported_isas
from pympa.mesh import Plan
from pympa.model import Model
from pympa.rules import check_plan
from pympa.spec import numpy_dtype
from pympa.virtual import VirtualEndpoint, VirtualWorld

_MOST_MICRO_BATCHES = 32
_CLEARLY_SLOWER = 0.95


@dataclass(frozen=True)
class Prediction:
    """One plan on a cluster, on virtual clocks.

    Attributes:
        plan: with the number of micro-batches that was fastest.
        step_seconds: of the slowest rank. compute, waiting: seconds of the rank that waits most.
        bytes_sent: by all ranks. peak_bytes: of the arena of the rank that needs most.
        transport_calls: that the simulation took.
    """

    plan: Plan
    step_seconds: float
    compute: float
    waiting: float
    bytes_sent: int
    peak_bytes: int
    transport_calls: int


def predict(
    size: Size, plan: Plan, dtype: str, cluster: Cluster, slow: dict[int, float] | None = None
) -> Prediction:
    """Run one step of a plan on shapes and clocks.

    Args:
        size: model and batch.
        plan: of at most the cluster's ranks.
        dtype: of weights and activations.
        cluster: what ranks compute with and how they are linked.
        slow: factor on the kernels' time of a rank, by rank.
    """
    ids = [np.broadcast_to(np.int32(0), (length,)) for length in size.lengths]
    costs, isa = Costs(cluster.device, dtype), supported_isas()[0]

    def body(endpoint: VirtualEndpoint) -> tuple[float, float, float, int, int]:
        rank = build_virtual_rank(endpoint, plan, costs, isa=isa)
        model = Model(size.model, rank, numpy_dtype(dtype))
        model.forward(model.prepare(ids))
        times = rank.trace.last.times()
        waiting = sum(times.waits.values())
        sent = rank.traffic.sent.total()
        return times.step, times.compute, waiting, sent, rank.arena.peak_bytes

    world = VirtualWorld(plan.world, cluster, slow)
    ranks = world.run(body)
    _, compute, waiting, _, _ = max(ranks, key=lambda rank: rank[2])
    return Prediction(
        plan,
        max(rank[0] for rank in ranks),
        compute,
        waiting,
        sum(rank[3] for rank in ranks),
        max(rank[4] for rank in ranks),
        world.calls,
    )


def simulate(options: argparse.Namespace) -> int:
    """Predict all experiments, print their tables and return the exit status.

    Raises:
        RefusedError: no cluster is named.
        ValueError: an experiment, cluster, dtype or plan that is not allowed.
    """
    if options.cluster is None:
        raise RefusedError(
            f"--backend virtual needs --cluster: one of {', '.join(packaged_clusters())}, or a "
            ".toml file"
        )
    cluster = load_cluster(options.cluster)
    for name in options.experiments or packaged_experiments():
        experiment = load_experiment(name)
        size = experiment.size(options.size, name)
        if options.router_skew is not None:
            size = size.skewed(options.router_skew)
        dtype = options.dtype or experiment.dtype
        runs = [PlannedRun(role="given", plan=text) for text in options.plan or []]
        rows = []
        for row in runs or experiment.plans:
            plan = row.resolve(size.model, cluster.ranks)
            check_plan(plan, size.model, cluster.ranks, size.batch)
            print(f"{name}: {row.role} {plan}", file=sys.stderr, flush=True)
            rows.append((row, _fastest(size, row, plan, dtype, cluster)))
        title = (
            f"{Path(name).name.removesuffix('.toml')} ({options.size}: {size} tokens, {dtype}), "
            f"simulated on {cluster.title}"
        )
        console().print(_table(title, size, dtype, cluster, rows))
    return 0


def _fastest(size: Size, row: PlannedRun, plan: Plan, dtype: str, cluster: Cluster) -> Prediction:
    """Return the prediction of the best number of micro-batches, where a family leaves it open."""
    best = predict(size, plan, dtype, cluster)
    if row.family is None or plan.pp == 1:
        return best
    count = 2
    while count <= _MOST_MICRO_BATCHES:
        variant = msgspec.structs.replace(plan, micro_batches=count)
        found = predict(size, variant, dtype, cluster)
        if found.step_seconds < best.step_seconds:
            best = found
        elif found.step_seconds * _CLEARLY_SLOWER > best.step_seconds:
            break
        count *= 2
    return best


def _table(
    title: str,
    size: Size,
    dtype: str,
    cluster: Cluster,
    rows: Sequence[tuple[PlannedRun, Prediction]],
) -> Table:
    """Return published, simulated and physically possible speeds side by side."""
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    table.add_column("plan", no_wrap=True)
    for heading in (
        "published\ntps",
        "simulated\ntps",
        "possible\ntps",
        "published\nratio",
        "simulated\nratio",
        "simulated\nwaiting",
        "GB sent",
        "peak GB\nper rank",
        "fits",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    tokens = sum(size.lengths)
    peak = cluster.device.flops_per_second[dtype] * cluster.ranks
    possible = tokens * peak / step_flops(size.model, size.lengths)
    base = next(((row, found) for row, found in rows if row.role == "baseline"), None)
    for row, found in rows:
        published = ratio = "-"
        if row.published_tps:
            published = f"{row.published_tps:,.0f}"
            if base is not None and base[0].published_tps:
                ratio = f"{row.published_tps / base[0].published_tps:.2f}"
        faster = "-" if base is None else f"{base[1].step_seconds / found.step_seconds:.2f}"
        table.add_row(
            f"{found.plan}\n{row.role}",
            published,
            f"{tokens / found.step_seconds:,.0f}",
            f"{possible:,.0f}",
            ratio,
            faster,
            f"{found.waiting / found.step_seconds:.0%}",
            f"{found.bytes_sent / 1e9:,.1f}",
            f"{found.peak_bytes / 1e9:,.1f}",
            "yes" if found.peak_bytes <= cluster.device.memory_bytes else "no",
        )
    table.caption = (
        "possible: useful flops at the data sheet's peak of all ranks; waiting: of the rank that "
        "waits most; experts take even loads"
    )
    return table
