"""The record of a measured plan; `pympa.bench.records.file` writes it to a file."""

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

from pympa.runtime.step import Overlap

SCHEMA = 2
SCHEMAS = (1, 2)
"""The schemas that can be read; in schema 1, bytes read in place counted as sent."""


class Spread(msgspec.Struct, frozen=True):
    """Seconds of the slowest rank over the iterations."""

    median: float
    min: float
    max: float
    p10: float
    p90: float
    iterations: int


class ByRank(msgspec.Struct, frozen=True):
    """One value for each rank, and the largest value."""

    by_rank: list[float]
    max: float


class ExpertUse(msgspec.Struct, frozen=True):
    """The load of a model's experts in a step.

    Attributes:
        rows: the number of rows of each expert in each layer that has experts.
        imbalance: the rows of a layer's busiest expert over the mean, in the worst layer.
        dropped: the number of choices that exceeded an expert's capacity.
        dropped_fraction: the number of dropped choices over the number of all choices.
    """

    rows: list[list[int]]
    imbalance: float
    dropped: int
    dropped_fraction: float


class StageUse(msgspec.Struct, frozen=True):
    """The layers of each pipeline stage, and the working set that the cache should hold.

    Attributes:
        layers: the pair (first, last + 1) of each stage.
        chunk_rows: the number of rows of the largest micro-batch on any rank.
        working_set_bytes: the bytes that the layer with the largest working set uses, with that
            many rows.
        cache_bytes: the bytes of a rank's cache; None where they are not known.
        cut_to_cache: whether micro-batches were cut so that the working set fits the cache.
    """

    layers: list[tuple[int, int]]
    chunk_rows: int
    working_set_bytes: int
    cache_bytes: int | None
    cut_to_cache: bool


class Simulation(msgspec.Struct, frozen=True):
    """The origin of a record's figures when nothing was measured.

    Attributes:
        cluster: the title of the cluster.
        slow: the parts that --slow makes slower.
        joules_per_token: the board power × the time in kernels, of all ranks, for each token.
        layers_simulated: the number of simulated passes of a rank through a layer.
        layers: the number of all passes; those not simulated are extrapolated from equal ones.
        transport_calls: the number of transport calls in the simulation.
    """

    cluster: str
    slow: list[str]
    joules_per_token: float
    layers_simulated: int
    layers: int
    transport_calls: int


class Forecast(msgspec.Struct, frozen=True):
    """The simulated result of a measured row at the paper's size.

    Attributes:
        cluster: the title of the cluster.
        plan: the plan with the number of micro-batches that is fastest there.
        simulated_tps: the simulated tokens/s.
        fits: whether the plan fits into the memory of the cluster's devices.
        idle_ranks: the number of ranks that hold no token.
    """

    cluster: str
    plan: str
    simulated_tps: float
    fits: bool
    idle_ranks: int = 0


class Environment(msgspec.Struct, frozen=True):
    """The machine and the software of a run.

    Attributes:
        host: the name of the node of rank 0.
        cores: the number of cores, or GPUs, that ranks may use.
        isa: the instruction set of the kernels, or "cuda".
        threads: the number of threads of each rank.
        mpi: the name and version of the MPI library.
        python: the version of Python.
        pympa: the version of pympa.
        command: the command line.
        device: the name of the GPU; None on CPUs.
        route: the route of arrays between GPUs; None on CPUs.
        isa_note: why hosts use another instruction set than their best one; None if they do not.
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
    isa_note: str | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The measured, or simulated, results of one plan.

    Attributes:
        schema: the version of these fields.
        job: the digest of model, lengths, input and the options that change the result; None if
            simulated.
        role: "baseline", "proposed", "given" (by --plan), or another word of the experiment.
        clock: "measured", or "simulated" by a cost model; a table column never mixes both.
        tokens: the number of tokens of the longest of `batch` sequences.
        tps: the tokens of the batch / the median step of the slowest rank.
        tpot_ms: the ms for each token, 1000 / tps.
        step_seconds: the seconds of a step on the slowest rank.
        compute_seconds: the seconds in kernels in a step.
        comm_seconds: the seconds of exposed waiting in a step.
        hidden_seconds: the seconds in a step with messages in flight and without waiting.
        overlap: the seconds of a step in flight, exposed and hidden, by axis, on the rank that
            waits most, as `pympa.runtime.step` defines them. None in older records.
        comm_fraction: the largest exposed waiting / step; None if oversubscribed.
        bubble_fraction: the largest waiting for other stages / step; None without stages.
        bytes_sent: the bytes sent in messages of one step.
        bytes_received: the bytes received in messages of one step.
        bytes_sent_by_axis: the bytes sent by all ranks in one step, by axis.
        bytes_read: the bytes of keys and values read from other ranks' memory in one step.
        bytes_read_by_axis: the bytes read by all ranks in one step, by axis.
        peak_bytes: the high-water mark of the arena.
        process_peak_bytes: the high-water mark of the resident set; None if simulated.
        flops_per_token: the number of useful flops for each token.
        performed_flops: the performed over the useful flops; 1 if no rank repeats another's work.
        roofline_fraction: the least possible seconds / the measured seconds.
        idle_ranks: the number of ranks that hold no token of the batch.
        oversubscribed: whether a node has more ranks × threads than cores, or more ranks than GPUs.
        error: the error of `error_of`.
        tolerance: the tolerance of `error_of`.
        error_of: the name of the output that comes closest to its tolerance.
        error_one_rank: the error of the same output on one rank.
        sampled_rows: the number of checked rows if the oracle is not run on all; None means all.
        exact: False for a plan that computes another model on purpose.
        stages: the layers of each stage and their working set; None without stages.
        experts: the load of the experts; None for a dense model.
        router_skew: the value of --router-skew; None if it is not given.
        context: the tokens by which dynamic and longrope embeddings were chosen; None if the model
            has none.
        shared_memory: whether ranks read other ranks' keys and values in shared memory.
        simulation: the origin of the figures, if simulated.
        forecast: the simulated result of the same row at the paper's size, for a measured row.
        joules_per_token: the joules of all GPUs for each token, measured by --energy.
        searched: the tokens/s of each number of micro-batches that was tried, by plan.
        repeat: the number of the repetition, from 1.
        published_tps: the tokens/s that the paper prints.
        published_tpot_ms: the ms for each token that the paper prints.
        ttft_ms: reserved for generation.
        itl_ms: reserved for generation.
        new_tokens: reserved for generation.
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
    bytes_read: ByRank | None = None
    bytes_read_by_axis: dict[str, int] = {}
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
    context: int | None = None
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
    """Return one value for each rank, and the largest."""
    return ByRank(values, max(values))


def expert_use(rows: Mapping[int, NDArray[np.int64]], dropped: int) -> ExpertUse | None:
    """Summarise the number of rows of each expert, by layer; None without experts."""
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
    isa_note: str | None = None,
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
        isa_note=isa_note,
    )
