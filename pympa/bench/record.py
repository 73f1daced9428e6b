"""What is kept of each measured plan; `pympa.bench.record_file` writes it down."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from pympa.step import Overlap

SCHEMA = 1


class Spread(msgspec.Struct, frozen=True):
    """Seconds of the slowest rank over the iterations."""

    median: float
    min: float
    max: float
    p10: float
    p90: float
    iterations: int


class ByRank(msgspec.Struct, frozen=True):
    """One value for each rank, and the largest."""

    by_rank: list[float]
    max: float


class ExpertUse(msgspec.Struct, frozen=True):
    """What the experts of a model had to do in a step.

    Attributes:
        rows: that each expert of each layer took, layers without experts left out.
        imbalance: rows of a layer's busiest expert over the mean, in the worst layer.
        dropped: choices past an expert's capacity, and as a fraction of all choices.
    """

    rows: list[list[int]]
    imbalance: float
    dropped: int
    dropped_fraction: float


class StageUse(msgspec.Struct, frozen=True):
    """How a model lies on pipeline stages, and what the cache has to hold.

    Attributes:
        layers: (first, last + 1) of each stage.
        chunk_rows: of the largest micro-batch on any rank.
        working_set_bytes: of the layer's step that touches most, with so many rows.
        cache_bytes: that a rank may call its own; None where it is not known.
        cut_to_cache: micro-batches were cut so that the working set fits the cache.
    """

    layers: list[tuple[int, int]]
    chunk_rows: int
    working_set_bytes: int
    cache_bytes: int | None
    cut_to_cache: bool


class Simulation(msgspec.Struct, frozen=True):
    """Where a record's figures come from when nothing was measured.

    Attributes:
        cluster: its title. slow: parts that --slow makes slower.
        joules_per_token: board power × time in kernels, of all ranks.
        layers_simulated: passes of a rank through layers. layers: those that there are; the others
            were like these.
        transport_calls: that the simulation took.
    """

    cluster: str
    slow: list[str]
    joules_per_token: float
    layers_simulated: int
    layers: int
    transport_calls: int


class Forecast(msgspec.Struct, frozen=True):
    """What the simulator says of a measured row at the paper's size.

    Attributes:
        cluster: its title. plan: with the micro-batches that were fastest there.
        simulated_tps: tokens/s. fits: into the memory of the cluster's devices.
        idle_ranks: ranks that hold no token.
    """

    cluster: str
    plan: str
    simulated_tps: float
    fits: bool
    idle_ranks: int = 0


class Environment(msgspec.Struct, frozen=True):
    """What the run ran on.

    Attributes:
        cores: that ranks may use, or GPUs.
        isa: instruction set of the kernels, or cuda.
        device: what computed where it was no CPU. route: how its arrays travelled.
    """

    host: str
    cores: int
    isa: str
    threads: int
    mpi: str
    python: str
    pympa: str
    command: str
    device: str | None = None
    route: str | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one plan.

    Attributes:
        schema: version of these fields.
        job: digest of model, lengths, input and the options that change what is measured; None if
            simulated.
        role: "baseline", "proposed", "given" (by --plan), or an experiment's own word.
        clock: "measured", or "simulated" by a cost model; never mixed in a column.
        tokens: of the longest of `batch` sequences.
        tps: tokens of the batch / median step of the slowest rank. tpot_ms: 1000 / tps.
        step_seconds: of the slowest rank.
        compute_seconds: in kernels, a step. comm_seconds: exposed waiting, a step.
        hidden_seconds: with messages in flight and no waiting, a step.
        overlap: seconds of a step in flight, exposed and hidden, by axis, on the rank that waits
            most; `pympa.step` defines them. None where pympa did not record it yet.
        comm_fraction: largest exposed waiting / step; None if oversubscribed.
        bubble_fraction: largest waiting on other stages / step; None without stages.
        bytes_sent, bytes_received: of one step.
        peak_bytes: high-water mark of the arena. process_peak_bytes: of the resident set;
            None if simulated.
        flops_per_token: useful ones. performed_flops: over useful ones, 1 where no rank does what
            another does. roofline_fraction: least possible seconds / measured.
        idle_ranks: ranks that hold no token of the batch.
        oversubscribed: some node has more ranks × threads than cores, or more ranks than GPUs.
        error, tolerance: of `error_of`, the output that comes closest to its tolerance.
        error_one_rank: of the same output on one rank.
        sampled_rows: rows checked where the whole oracle would not fit; None means all.
        exact: False for a plan that computes another model on purpose.
        stages: layers on stages and their working set; None without stages.
        experts: load of the experts; None for a dense model. router_skew: where --router-skew
            replaced the experiment's.
        shared_memory: ranks read keys and values of others where they are, in place of messages.
        simulation: of what cluster, if simulated. forecast: of the same row at the paper's size,
            beside a measured one.
        joules_per_token: of all GPUs, measured by --energy.
        searched: tokens/s of each variant in micro-batches. repeat: from 1.
        ttft_ms, itl_ms, new_tokens: reserved for generation.
    """

    schema: int = SCHEMA
    experiment: str
    job: str | None = None
    role: str
    plan: str
    ranks: int
    backend: Literal["cpu", "cuda", "virtual"] = "cpu"
    clock: Literal["measured", "simulated"] = "measured"
    dtype: str
    size: str
    batch: int
    tokens: int
    tps: float
    tpot_ms: float
    step_seconds: Spread
    compute_seconds: ByRank
    comm_seconds: ByRank
    hidden_seconds: ByRank | None = None
    overlap: dict[str, Overlap] | None = None
    comm_fraction: float | None
    bubble_fraction: float | None
    bytes_sent: ByRank
    bytes_received: ByRank
    bytes_sent_by_axis: dict[str, int]
    peak_bytes: ByRank
    process_peak_bytes: ByRank | None
    flops_per_token: float
    performed_flops: float = 1.0
    roofline_fraction: float
    idle_ranks: int = 0
    oversubscribed: bool
    error: float | None
    tolerance: float | None
    error_of: str | None
    error_one_rank: float | None
    sampled_rows: int | None
    verified: bool
    exact: bool = True
    stages: StageUse | None = None
    experts: ExpertUse | None = None
    router_skew: float | None = None
    shared_memory: bool = False
    simulation: Simulation | None = None
    forecast: Forecast | None = None
    joules_per_token: float | None = None
    searched: dict[str, float]
    repeat: int = 1
    published_tps: float | None
    published_tpot_ms: float | None
    ttft_ms: float | None = None
    itl_ms: float | None = None
    new_tokens: int | None = None
    environment: Environment


def spread(seconds: list[float]) -> Spread:
    """Summarise the slowest rank's seconds of each iteration."""
    p10, median, p90 = (float(p) for p in np.percentile(seconds, (10, 50, 90)))
    return Spread(median, min(seconds), max(seconds), p10, p90, len(seconds))


def by_rank(values: list[float]) -> ByRank:
    """Keep one value for each rank, and the largest."""
    return ByRank(values, max(values))


def expert_use(rows: Mapping[int, NDArray[np.int64]], dropped: int) -> ExpertUse | None:
    """Summarise the rows that each expert took, by layer; None without experts."""
    if not rows:
        return None
    taken = sum(int(of_layer.sum()) for of_layer in rows.values())
    return ExpertUse(
        [rows[layer].tolist() for layer in sorted(rows)],
        max(float(of_layer.max() / max(of_layer.mean(), 1.0)) for of_layer in rows.values()),
        dropped,
        dropped / max(taken + dropped, 1),
    )


def environment(
    *,
    cores: int,
    isa: str,
    threads: int,
    mpi: str,
    device: str | None = None,
    route: str | None = None,
) -> Environment:
    """Describe this machine and this command."""
    return Environment(
        host=platform.node(),
        cores=cores,
        isa=isa,
        threads=threads,
        mpi=mpi,
        python=platform.python_version(),
        pympa=version("pympa"),
        command=" ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        device=device,
        route=route,
    )
