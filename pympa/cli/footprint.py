"""`pympa footprint`: the memory that a plan needs, by rank and by layer, without running it.

It needs no MPI, and no memory for the model. Every rank runs on shapes, and the printed bytes are
those that the arena of a real run allocates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pympa.command.line import (
    Parser,
    add_batch,
    byte_count,
    complain,
    count,
    thread_count,
    unblock_interrupts,
)
from pympa.errors import RefusedError

if TYPE_CHECKING:
    import numpy as np

    from pympa.bench.experiment.description import Experiment, Size
    from pympa.footprint.fits import Memory
    from pympa.footprint.rehearsal import Rehearsal
    from pympa.plan.mesh import Plan
    from pympa.plan.partition import Stages
    from pympa.text.table import Table

_KEPT_RANKS = 256  # whose weights, as shapes, are kept to be run again


def build_parser(prog: str = "pympa footprint") -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=prog,
        description="Print the memory that a plan needs, by rank and by layer, without MPI and "
        "without running the model.",
        add_help=False,
    )
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        metavar="EXPERIMENT|FILE.toml|DIRECTORY",
        help="a packaged experiment, a TOML file that describes an experiment or only a model, or "
        "a model directory with a config.json",
    )
    add("-h", "--help", action="store_true", help="show this and exit")
    add("--plan", metavar="PLAN", help="the plan, as in tp=8,pp=2")
    add("--size", default="local", help="size of the experiment: local (default), paper, ...")
    add("--dtype", help="float32, float16 or bfloat16 instead of the experiment's")
    add("--micro-batches", type=count(1), metavar="N", help="micro-batches instead of the plan's")
    add_batch(parser)
    add(
        "--cache",
        type=byte_count,
        metavar="BYTES",
        help="cache bytes of a rank, as in 50MB or 2MiB; default: those of this machine",
    )
    add(
        "--weight-limit",
        type=byte_count,
        metavar="BYTES",
        help="cut layers into stages so that no rank holds more bytes of weight matrices than this",
    )
    add(
        "--cluster",
        metavar="NAME",
        help="tell whether the plan fits this hardware, a name or a TOML file, instead of this "
        "host with all ranks on it",
    )
    add("--threads", type=thread_count, default=1, metavar="N", help="threads of each rank (1)")
    add("--isa", metavar="NAME", help="instruction set of the kernels; default: the best")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Print the tables and return the exit status."""
    unblock_interrupts()
    parser = build_parser()
    try:
        options = parser.parse_args(arguments)
        if options.help:
            print(parser.format_help())
            return 0
        _print_footprint(options)
    except (ValueError, OSError) as error:
        return complain(error)
    return 0


@dataclass(frozen=True)
class _Request:
    """A model and a plan, with everything that a rehearsal needs."""

    size: Size
    plan: Plan
    dtype: np.dtype[Any]
    stages: Stages
    isa: str
    threads: int

    def rehearsal(self, rank: int) -> Rehearsal:
        """Return the rehearsal of a rank."""
        from pympa.footprint.rehearsal import Rehearsal

        return Rehearsal(
            self.size.model,
            self.plan,
            rank,
            self.dtype,
            isa=self.isa,
            threads=self.threads,
            stages=self.stages,
        )


def _print_footprint(options: argparse.Namespace) -> None:
    from pympa.cli.footprint_table import fit_table, layer_table, rank_table, working_set_table
    from pympa.footprint.fits import find_fit
    from pympa.footprint.survey import survey
    from pympa.hardware.caches import cache_of_rank
    from pympa.text.table import show

    if options.model is None or options.plan is None:
        raise RefusedError(
            "footprint: expected a model and a plan, as in: pympa footprint stages --plan tp=8,pp=2"
        )
    experiment, size = _load(options)
    asked = _request(options, experiment, size)
    rehearsal_of = lru_cache(maxsize=_KEPT_RANKS)(asked.rehearsal)
    found = survey(size.model, asked.plan, size.lengths, rehearsal_of)
    memory = _memory(options, asked.plan)
    found_fit = find_fit(memory, rehearsal_of, asked.plan, size.lengths)
    cache = options.cache or cache_of_rank(options.threads)
    ours = "" if size.ours is None else f" ({size.ours})"
    title = f"{options.model}: {size} tokens{ours}, {asked.dtype.name}, {asked.plan}, {asked.isa}"
    tables = [
        rank_table(title, found, cache),
        layer_table(found),
        working_set_table(found, _fitting(asked, cache)),
        *_published(options, experiment),
        fit_table(found_fit, size.lengths),
    ]
    for table in tables:
        show(table)
        print()


def _memory(options: argparse.Namespace, plan: Plan) -> Memory:
    """Return the memory that is asked about: that of this host for all ranks, or of a cluster."""
    from pympa.costs.cluster import load_cluster
    from pympa.footprint.fits import Memory
    from pympa.hardware.memory import DEVICE_BYTES, LIBRARY_BYTES, available_bytes

    if options.cluster is None:
        name = "this host, with all ranks on it"
        return Memory(name, available_bytes(), plan.world, LIBRARY_BYTES)
    device = load_cluster(options.cluster).device
    return Memory(device.name, int(device.memory_bytes), 1, DEVICE_BYTES)


def _fitting(asked: _Request, cache: int | None) -> list[int | None]:
    """Return the rows of the largest chunk that fits the cache, for each stage."""
    from pympa.footprint.working_set import fitting_chunk, working_sets

    firsts = [stage * asked.plan.stage_ranks for stage in range(asked.plan.pp)]
    if cache is None:
        return [None for _ in firsts]
    most = sum(asked.size.lengths)
    return [fitting_chunk(working_sets(asked.rehearsal(rank)), cache, most) for rank in firsts]


def _published(options: argparse.Namespace, experiment: Experiment) -> list[Table]:
    """Return the sizes that a paper prints for its model, beside those its dimensions give."""
    from pympa.bench.report.published_figures import compare_figures
    from pympa.cli.footprint_table import figure_table
    from pympa.footprint.working_set import working_sets

    published, paper = experiment.published_footprint, experiment.sizes.get("paper")
    if published is None or paper is None:
        return []
    asked = _request(options, experiment, paper)
    figures = compare_figures(
        published,
        paper.model,
        paper.lengths,
        asked.dtype.itemsize,
        working_sets(asked.rehearsal(0)),
    )
    return [figure_table(f"printed in seed {experiment.seed}, paper size", figures)]


def _load(options: argparse.Namespace) -> tuple[Experiment, Size]:
    """Return the requested experiment and size; a single model is wrapped in an experiment."""
    from pympa.bench.experiment.own_model import Batch, load_described

    described = load_described(options.model, Batch.of(options), with_weights=False)
    experiment = described.experiment
    return experiment, experiment.size(options.size, options.model)


def _request(options: argparse.Namespace, experiment: Experiment, size: Size) -> _Request:
    """Return the request, after checking that it is possible.

    Raises:
        ValueError: the request is not possible.
    """
    import msgspec

    from pympa.bench.experiment.description import PlannedRun
    from pympa.bench.experiment.rows import resolve_row
    from pympa.kernels.cpu import supported_isas
    from pympa.plan.mesh import parse_plan
    from pympa.spec import numpy_dtype

    plan = parse_plan(options.plan)
    if options.micro_batches is not None:
        plan = msgspec.structs.replace(plan, micro_batches=options.micro_batches)
    dtype = numpy_dtype(options.dtype or experiment.dtype)
    row = resolve_row(
        PlannedRun(role="given", plan=str(plan)),
        size,
        plan.world,
        itemsize=dtype.itemsize,
        limit_bytes=options.weight_limit,
    )
    offers = supported_isas()
    if options.isa is not None and options.isa not in offers:
        raise RefusedError(f"--isa: expected one of {', '.join(offers)}; got {options.isa!r}")
    return _Request(size, row.plan, dtype, row.stages, options.isa or offers[0], options.threads)
