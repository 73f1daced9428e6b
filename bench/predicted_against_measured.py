"""Compare the simulator's times with measured steps: `mpirun -n 2 python bench/...py`.

One run calibrates this machine (or reads a profile), measures configurations that calibration did
not use, predicts each on virtual clocks from the profile alone, and prints both with the signed
error. Nothing is fitted to these measurements; the routing to experts is taken from the run,
because it depends on the data. The bytes between each pair of ranks and the arena's peak must be
equal.

    mpirun -n 2 python bench/predicted_against_measured.py
    mpirun -n 2 python bench/predicted_against_measured.py --profile P.toml --part 1/2 --output R
    mpirun -n 2 python bench/predicted_against_measured.py --profile P.toml --part 2/2 --output R

The second form is for machines that are quiet only for a minute or two at a time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from pympa.calibrate.run import calibrate
from pympa.costs.cluster import Cluster, load_cluster
from pympa.costs.device_costs import costs_of
from pympa.errors import RefusedError
from pympa.model.model import Model, Prepared
from pympa.model.resources import RankResources
from pympa.plan.mesh import parse_plan
from pympa.runtime.step import Span, Step
from pympa.runtime.traffic import Traffic
from pympa.session.session import Session
from pympa.session.team import Team
from pympa.sim.resources import virtual_resources
from pympa.sim.world import VirtualEndpoint, VirtualWorld
from pympa.spec import LayerSpec, ModelSpec, numpy_dtype
from pympa.text.table import Table, show

ROUNDS, STEPS = 3, 4
MEDIAN_BAR, WORST_BAR, BEST_BAR = 0.10, 0.25, 0.05


class Configuration(NamedTuple):
    """A model, a batch and a plan; plans of the same `model` are compared with each other."""

    model: str
    plan: str
    lengths: tuple[int, ...]
    dtype: str = "bfloat16"


def _model(width: int, layers: int, heads: int, head_dim: int, hidden: int, **other: Any) -> Any:
    layer = LayerSpec(repeat=layers, heads=heads, head_dim=head_dim, mlp_hidden=hidden, **other)
    return ModelSpec(d_model=width, vocabulary=256, layers=(layer,))


MODELS: dict[str, ModelSpec] = {
    "tiny": _model(96, 3, 6, 16, 384),
    "small": _model(320, 4, 5, 64, 1280),
    "wide": _model(1152, 2, 9, 128, 3456, kv_heads=3, gated=True, activation="silu"),
    "grouped": _model(640, 3, 10, 96, 1600, kv_heads=2, v_head_dim=48, qk_norm="head"),
    "window": _model(448, 3, 2, 256, 1800, window=300, norm="layer", attention_bias=True),
    "experts": _model(384, 2, 6, 64, 768, experts=6, top_k=2),
}
CONFIGURATIONS = (
    Configuration("tiny", "tp=1", (70, 50)),
    Configuration("tiny", "tp=2", (70, 50)),
    Configuration("tiny", "pp=2,micro_batches=3", (400, 300, 300), "float32"),
    Configuration("small", "tp=1", (1500, 700)),
    Configuration("small", "cp=2", (1500, 700)),
    Configuration("small", "tp=2", (1500, 700)),
    Configuration("small", "pp=2,micro_batches=4", (1500, 700)),
    Configuration("small", "pp=2,micro_batches=8", (1500, 700)),
    Configuration("small", "dp=2", (1500, 700)),
    Configuration("small", "dim=2", (1500, 700)),
    Configuration("small", "tp=1", (6000,), "float32"),
    Configuration("wide", "tp=1", (48,)),
    Configuration("wide", "tp=2", (900,)),
    Configuration("wide", "cp=2", (900,), "float32"),
    Configuration("grouped", "tp=1,micro_batches=3", (1300,)),
    Configuration("grouped", "cp=2", (2600,)),
    Configuration("window", "tp=1", (800, 500), "float32"),
    Configuration("experts", "tp=1", (900,), "float32"),
    Configuration("experts", "dp=2,ep=2", (500, 500, 300, 300)),
    Configuration("experts", "cp=2", (500, 500, 300, 300)),
    Configuration("experts", "tp=2,ep=2", (500, 500, 300, 300)),
)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One configuration, measured and predicted.

    Attributes:
        model: the name of the model.
        plan: the plan.
        tokens: the number of tokens of the batch.
        dtype: the dtype of weights and activations.
        ranks: the number of ranks of the plan.
        measured: the median seconds of a step on the slowest rank.
        predicted: the predicted seconds of a step on the slowest rank.
        same_bytes: whether the predicted bytes are the measured ones.
        same_peak: whether the predicted peak is the measured one.
        spans: the measured and predicted seconds of each kernel or wait, on the slowest rank.
    """

    model: str
    plan: str
    tokens: int
    dtype: str
    ranks: int
    measured: float
    predicted: float
    same_bytes: bool
    same_peak: bool
    spans: dict[str, tuple[float, float]]

    @property
    def error(self) -> float:
        """The signed relative error of the prediction."""
        return self.predicted / self.measured - 1


class Facts(NamedTuple):
    """The record of a step of one rank: seconds, bytes moved, arena peak, spans."""

    seconds: float
    traffic: Traffic
    peak_bytes: int
    spans: list[Span]


class Measured:
    """A configuration on this rank, loaded and warmed up. Collective."""

    def __init__(self, team: Team, configuration: Configuration) -> None:
        self.rank = team.resources(parse_plan(configuration.plan))
        self.routing = record_routing(self.rank)
        spec = MODELS[configuration.model]
        self.model = Model(spec, self.rank, numpy_dtype(configuration.dtype))
        self.prepared: Prepared = self.model.prepare(token_ids(configuration.lengths))
        self.model.forward(self.prepared)
        self.one_step = self.routing[:]
        self.steps: list[Step] = []

    def step(self, team: Team) -> None:
        """Time some steps, after an untimed one that fills the caches. Collective."""
        self.model.forward(self.prepared)
        for _ in range(STEPS):
            team.barrier()
            self.rank.traffic.clear()
            self.model.forward(self.prepared)
            self.steps.append(self.rank.trace.last)

    def facts(self) -> list[Facts]:
        """Return the record of each step of this rank."""
        traffic, peak_bytes = self.rank.traffic.copy(), self.rank.arena.peak_bytes
        return [
            Facts(step.stop - step.start, traffic, peak_bytes, step.spans) for step in self.steps
        ]


def record_routing(resources: RankResources) -> list[NDArray[np.int64]]:
    """Return a list that receives the rows of each expert from every call of `sort_rows`."""
    found: list[NDArray[np.int64]] = []
    sort_rows = resources.kernels.sort_rows

    def recording(*arguments: Any) -> NDArray[np.int64]:
        found.append(sort_rows(*arguments))
        return found[-1]

    resources.kernels.sort_rows = recording  # type: ignore[method-assign]
    return found


def token_ids(lengths: Sequence[int]) -> list[NDArray[np.int32]]:
    """Return sequences of tokens."""
    ids = np.random.default_rng(0).integers(0, 256, sum(lengths)).astype(np.int32)
    return np.split(ids, np.cumsum(lengths)[:-1])


def predict(
    configuration: Configuration, profile: Cluster, isa: str, routing: Sequence[Any]
) -> list[Facts]:
    """Run one step of all ranks on virtual clocks."""
    plan, dtype = parse_plan(configuration.plan), configuration.dtype
    costs = costs_of(profile.device, dtype, plan.world)

    def body(endpoint: VirtualEndpoint) -> Facts:
        counts = routing[endpoint.rank]
        resources = virtual_resources(endpoint, plan, costs, isa=isa, routing=counts)
        model = Model(MODELS[configuration.model], resources, numpy_dtype(dtype))
        model.forward(model.prepare(token_ids(configuration.lengths)))
        step = resources.trace.last
        seconds = step.stop - step.start
        return Facts(seconds, resources.traffic, resources.arena.peak_bytes, step.spans)

    return VirtualWorld(plan.world, profile).run(body)


def compare(configuration: Configuration, profile: Cluster, isa: str, ranks: Any) -> Result:
    """Compare one configuration's prediction with its ranks' measured facts and routing."""
    facts, routing = zip(*ranks, strict=True)
    found = predict(configuration, profile, isa, routing)
    slowest = max(range(len(found)), key=lambda rank: found[rank].seconds)
    by_step = [max(fact.seconds for fact in step) for step in zip(*facts, strict=True)]
    typical = by_step.index(statistics.median_low(by_step))
    measured, predicted = facts[slowest][typical], found[slowest]
    names = sorted({span.name for span in (*measured.spans, *predicted.spans)})
    return Result(
        model=configuration.model,
        plan=configuration.plan,
        tokens=sum(configuration.lengths),
        dtype=configuration.dtype,
        ranks=len(found),
        measured=by_step[typical],
        predicted=predicted.seconds,
        same_bytes=all(f[-1].traffic == p.traffic for f, p in zip(facts, found, strict=True)),
        same_peak=all(f[-1].peak_bytes == p.peak_bytes for f, p in zip(facts, found, strict=True)),
        spans={name: (_total(measured, name), _total(predicted, name)) for name in names},
    )


def _total(facts: Facts, name: str) -> float:
    return sum(span.stop - span.start for span in facts.spans if span.name == name)


def measure(team: Team, wanted: Sequence[Configuration], profile: Cluster) -> list[Result]:
    """Measure configurations in rounds, and predict them on rank 0. Collective."""
    plans = [parse_plan(configuration.plan) for configuration in wanted]
    loaded: dict[int, Measured] = {}
    for number, (plan, configuration) in enumerate(zip(plans, wanted, strict=True)):

        def load(team: Team, number: int = number, what: Configuration = configuration) -> None:
            loaded[number] = Measured(team, what)

        team.on_first(plan.world, load)
    for _ in range(ROUNDS):
        for number, plan in enumerate(plans):
            team.on_first(plan.world, lambda team, number=number: loaded[number].step(team))
    mine = {number: (run.facts(), run.one_step) for number, run in loaded.items()}
    everyone = team.world.gather_objects(mine, root=0)
    results = []
    for number, configuration in enumerate(wanted):
        if team.rank == 0:
            ranks = [of_rank[number] for of_rank in everyone if number in of_rank]
            results.append(compare(configuration, profile, team.isa, ranks))
    return results


def report(results: Sequence[Result], *, spans: bool) -> bool:
    """Print all results and return whether they pass."""
    table = Table("one step, ms", keys=2)
    for heading in ("model", "plan", "tokens", "dtype", "measured", "predicted", "error"):
        table.add_column(heading, text=heading in ("model", "plan", "dtype"))
    table.add_column("bytes, peak", text=True)
    for found in results:
        exact = "equal" if found.same_bytes and found.same_peak else "DIFFERENT"
        row = (found.model, found.plan, f"{found.tokens:,}", found.dtype)
        times = f"{1e3 * found.measured:.2f}", f"{1e3 * found.predicted:.2f}"
        table.add_row(*row, *times, f"{found.error:+.1%}", exact)
    show(table)
    if spans:
        for found in results:
            parts = (
                f"{name} {1e3 * a:.2f}/{1e3 * b:.2f}"
                for name, (a, b) in sorted(found.spans.items(), key=lambda item: -item[1][0])
            )
            print(f"{found.model} {found.plan} {found.dtype}: " + ", ".join(parts))
    errors = [abs(found.error) for found in results]
    median, worst = statistics.median(errors), max(errors)
    print(
        f"|error|: median {median:.1%} (limit {MEDIAN_BAR:.0%}), "
        f"worst {worst:.1%} (limit {WORST_BAR:.0%})"
    )
    exact = all(found.same_bytes and found.same_peak for found in results)
    print(f"bytes by rank and pair, arena peaks: {'all equal' if exact else 'NOT ALL EQUAL'}")
    passed = median <= MEDIAN_BAR and worst <= WORST_BAR and exact
    groups: defaultdict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for found in results:
        if found.ranks > 1:
            groups[found.model, found.tokens, found.dtype].append(found)
    for (model, *_), plans in groups.items():
        if len(plans) > 1:
            chosen = min(plans, key=lambda found: found.predicted)
            best = min(plans, key=lambda found: found.measured)
            behind = chosen.measured / best.measured - 1
            print(
                f"{model}: predicted best {chosen.plan}, measured best {best.plan}: {behind:+.1%}"
            )
            passed = passed and behind <= BEST_BAR
    return passed


def main() -> int:
    """Run this rank's part and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", help="profile of this machine; default: calibrate now")
    parser.add_argument("--part", default="1/1", help="I/N: only the I-th of N parts")
    parser.add_argument("--output", help="append results to this file; report all of its results")
    parser.add_argument("--spans", action="store_true", help="also print seconds by kernel")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    status = 0
    with Session() as session:
        if session.size != 2:
            raise RefusedError(f"expected 2 ranks; got {session.size}: start it with mpirun -n 2")
        start = time.monotonic()
        if options.profile:
            profile = load_cluster(options.profile)
        else:
            dtypes = sorted({configuration.dtype for configuration in CONFIGURATIONS})
            profile, _ = calibrate(session.team, dtypes)
        calibrated = time.monotonic()
        results = measure(session.team, CONFIGURATIONS[part - 1 :: parts], profile)
        if session.rank == 0:
            done = time.monotonic()
            print(f"{calibrated - start:.0f} s calibration, {done - calibrated:.0f} s steps")
            if options.output:
                with Path(options.output).open("ab") as file:
                    file.writelines(msgspec.json.encode(found) + b"\n" for found in results)
                lines = Path(options.output).read_bytes().splitlines()
                results = [msgspec.json.decode(line, type=Result) for line in lines]
            status = 0 if report(results, spans=options.spans) else 1
    return status


if __name__ == "__main__":
    sys.exit(main())
