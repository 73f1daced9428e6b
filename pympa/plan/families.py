"""The plans of the studied systems, for any number of ranks."""

from __future__ import annotations

import math

from pympa.plan.enumerate import divisors
from pympa.plan.mesh import Plan, PlanError
from pympa.plan.rules import head_pairs
from pympa.spec import ModelSpec

FAMILIES = ("baseline", "ring", "ring-ep", "grid", "experts", "stages", "stages-tp")


def _most(ranks: int, limit: int) -> int:
    """Return the largest divisor of `ranks` that is at most `limit`."""
    return max(d for d in divisors(ranks) if d <= limit)


def family_plan(family: str, spec: ModelSpec, world: int) -> Plan:
    """Return the plan of a studied system for any number of ranks.

    baseline: pp=2 if the number of ranks is even and there are two layers; tp is as large as the
    heads allow, and dp uses the remaining ranks; whole experts on as many ranks of a stage as
    possible. grid: tp and dim share the ranks, as equally as possible. ring: cp uses all ranks.
    ring-ep: the same with the experts spread over them. experts: dp uses all ranks, and the experts
    are spread over them. stages: pp is as large as the layers allow, and dp uses the remaining
    ranks. stages-tp: tp is then as large as the heads allow, and dp uses the remaining ranks.

    Raises:
        PlanError: no family has this name.
    """
    experts = min((block.experts for block in spec.blocks if block.experts), default=1)
    heads = min(block.heads for block in spec.blocks)

    def most_ep(ranks: int) -> int:
        return _most(ranks, experts)

    if family == "ring":
        return Plan(cp=world)
    if family == "grid":
        slices = min(min(head_pairs(block), block.value_dim) for block in spec.blocks)
        shapes = [(d, world // d) for d in divisors(world) if d <= heads and world // d <= slices]
        if not shapes:
            raise PlanError(f"family grid: expected at most heads × slices ranks; got {world}")
        tp, dim = min(shapes, key=lambda shape: (abs(math.log(shape[0] / shape[1])), -shape[0]))
        return Plan(tp=tp, dim=dim)
    if family == "ring-ep":
        return Plan(cp=world, ep=most_ep(world))
    if family == "experts":
        return Plan(dp=world, ep=most_ep(world))
    if family == "baseline":
        pp = 2 if world % 2 == 0 and len(spec.blocks) >= 2 else 1
        tp = _most(world // pp, heads)
        return Plan(pp=pp, tp=tp, dp=world // (pp * tp), ep=most_ep(world // pp))
    if family in ("stages", "stages-tp"):
        pp = _most(world, len(spec.blocks))
        tp = _most(world // pp, heads) if family == "stages-tp" else 1
        return Plan(pp=pp, tp=tp, dp=world // (pp * tp))
    raise PlanError(f"family: expected one of {', '.join(FAMILIES)}; got {family!r}")
