"""Plans on GPUs: within the contract, and those that split no sum with the bits of one rank.

    mpirun -n 4 python tests/support/drivers/gpu_plans.py --device-transport staged

A program and not a test: ranks are processes, and share a GPU where there is only one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from pympa import Session
from pympa.model.model import Model
from pympa.plan.mesh import Plan
from pympa.session.team import Team
from pympa.spec import DTYPES, ModelSpec
from pympa.transport.choice import DEVICE_TRANSPORTS
from pympa.verify.collect import Outputs, collect
from pympa.verify.compare import compare
from support import worlds
from support.compare import assert_same_bits

MODELS = {
    "dense": worlds.DENSE,
    "odd": worlds.ODD,
    "windowed": worlds.WINDOWED,
    "experts": worlds.EXPERTS,
    "odd experts": worlds.ODD_EXPERTS,
}


class Tally(NamedTuple):
    """Plans that ran, those that had to have the bits of one rank, and what was wrong."""

    ran: int
    same_bits: int
    wrong: list[str]


def outputs_of(team: Team, spec: ModelSpec, plan: Plan, dtype: str) -> Outputs | None:
    """Run one step of a plan; rank 0 gets all that it computes. Collective."""
    rank = team.resources(plan)
    try:
        model = Model(spec, rank, DTYPES[dtype])
        ids = worlds.batch(worlds.LENGTHS, spec.vocabulary)
        return collect(model, model.prepare(ids), team.world)
    finally:
        rank.arena.close()


def splits_no_sum(plan: Plan) -> bool:
    """Tell whether a plan moves activations only."""
    return plan.cp == plan.tp == plan.dim == 1 and plan.etp in (None, 1)


def check_model(team: Team, name: str, dtype: str, most: int, until: float) -> Tally:
    """Run some plans of 2 up to all ranks. Collective.

    Args:
        team: all ranks.
        name: of the model.
        dtype: that it computes in.
        most: plans of a number of ranks.
        until: no plan starts after this time of rank 0.
    """
    spec, kind = MODELS[name], DTYPES[dtype]
    one = team.on_first(1, lambda team: outputs_of(team, spec, Plan(), dtype))
    alone, ran, same_bits, wrong = None, 0, 0, []
    if team.rank == 0:
        alone = compare(spec, kind, one, worlds.truth(spec, one, worlds.LENGTHS, dtype))
        if not alone.passed:
            wrong.append(f"{name} on one rank: {alone.failed[0]}")
    for size in sorted({2, team.size}):
        found = worlds.plans(size, spec)
        exact = [plan for plan in found if splits_no_sum(plan)]
        for plan in dict.fromkeys([*exact, *found[:: -(-len(found) // most)]]):
            if team.world.gather_objects(time.time() > until)[0]:
                return Tally(ran, same_bits, wrong)
            run = team.on_first(size, lambda team, p=plan: outputs_of(team, spec, p, dtype))
            ran, same_bits = ran + 1, same_bits + splits_no_sum(plan)
            if team.rank == 0:
                wrong += _objections(f"{name} {plan}", spec, kind, run, one, alone, plan)
    return Tally(ran, same_bits, wrong)


def _objections(what, spec, kind, run, one, alone, plan) -> list[str]:  # type: ignore[no-untyped-def]
    verdict = compare(spec, kind, run, worlds.truth(spec, run, worlds.LENGTHS, kind.name), alone)
    found = [] if verdict.passed else [f"{what}: {verdict.failed[0]}"]
    if splits_no_sum(plan):
        for name, array in one.items():
            try:
                assert_same_bits(run[name], array)
            except AssertionError as error:
                found.append(f"{what}: {name}: not the bits of one rank: {error}")
    return found


def main(arguments: list[str]) -> int:
    """Check all models on all ranks; return 1 if a plan is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--device-transport", choices=DEVICE_TRANSPORTS, default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--most", type=int, default=8, help="plans of each model and world (8)")
    parser.add_argument("--seconds", type=float, default=60, help="after which none starts (60)")
    options = parser.parse_args(arguments)
    until, tallies = time.time() + options.seconds, []
    with Session(
        backend=options.backend, device_transport=options.device_transport, timeout_seconds=30
    ) as session:
        for name in MODELS:
            tallies.append(check_model(session.team, name, options.dtype, options.most, until))
            if session.rank == 0:
                print(f"{name}: {tallies[-1].ran} plans, {tallies[-1].same_bits} bit by bit")
        wrong = [text for tally in tallies for text in tally.wrong]
        if session.rank == 0:
            print("\n".join(wrong), file=sys.stderr)
            ran, same_bits = (sum(tally[i] for tally in tallies) for i in range(2))
            print(f"key: {ran} plans, {same_bits} bit by bit, {len(wrong)} wrong", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
