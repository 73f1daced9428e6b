"""All plans of a number of ranks: degrees, placements of experts, and options.

`pympa.plan.rules` decides whether a plan can run a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import get_args

import msgspec

from pympa.plan.layout import Balance
from pympa.plan.mesh import DimAlgo, Plan


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, in ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def degree_choices(world: int) -> Iterator[Plan]:
    """Yield every way to write `world` as a product of the five axes."""
    for pp, dp, cp, tp in itertools.product(divisors(world), repeat=4):
        if world % (pp * dp * cp * tp) == 0:
            yield Plan(pp=pp, dp=dp, cp=cp, tp=tp, dim=world // (pp * dp * cp * tp))


def expert_choices(plan: Plan) -> Iterator[Plan]:
    """Yield a plan with every placement of experts on the ranks of a stage.

    Some of them cannot run, for example with an etp that does not fit the columns: see `rules`.
    """
    columns = plan.degree("columns")
    degrees = divisors(plan.world)
    for ep in degrees:
        for etp in (None, *(d for d in degrees if columns % d == 0)):
            yield msgspec.structs.replace(plan, ep=ep, etp=etp)


def option_choices(plan: Plan) -> Iterator[Plan]:
    """Yield a plan with every option of `cp` and `dim`.

    `dim_algo=independent` is left out, because it computes another model.
    """
    groups = divisors(plan.cp)
    schemes = [("ring", u) for u in groups] + [("allgather", u) for u in groups[:-1]]
    exact = [algorithm for algorithm in get_args(DimAlgo) if algorithm != "independent"]
    algorithms = exact if plan.dim > 1 else exact[:1]
    orders = get_args(Balance) if plan.cp > 1 or plan.splits_queries else get_args(Balance)[:1]
    for (scheme, ulysses), algorithm, balance in itertools.product(schemes, algorithms, orders):
        yield msgspec.structs.replace(
            plan, cp_scheme=scheme, ulysses=ulysses, dim_algo=algorithm, balance=balance
        )


def all_plans(world: int, *, experts: bool) -> Iterator[Plan]:
    """Yield every plan of `world` ranks, with one micro-batch.

    Args:
        world: the number of ranks.
        experts: whether the model has experts, so that all placements are included.
    """
    for plan in degree_choices(world):
        for placed in expert_choices(plan) if experts else [plan]:
            yield from option_choices(placed)
