"""Which plans can run, which come near them, and those of the studied systems.

Purely local arithmetic: nothing is sent, and every rank comes to the same verdict.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import msgspec

from pympa.layout import Balance, split_batch, split_tokens
from pympa.mesh import AXES, Plan, PlanError
from pympa.spec import LayerSpec, ModelSpec

FAMILIES = ("baseline", "ring", "ring-ep", "grid", "experts", "stages", "stages-tp")


def broken_rule(plan: Plan, spec: ModelSpec, sequences: int) -> str | None:
    """Return the rule that `plan` breaks for a batch of `sequences`, or None if it can run."""
    layers = spec.blocks
    if plan.pp > len(layers):
        return f"pp={plan.pp} stages need at least as many layers; the model has {len(layers)}"
    fewest_heads = min(layer.heads for layer in layers)
    if plan.tp > fewest_heads:
        return f"tp={plan.tp} splits whole heads; the model has {fewest_heads}"
    dense = (layer.mlp_hidden for layer in layers if not layer.experts)
    narrowest = min([spec.vocabulary, *dense])
    columns = plan.tp * plan.dim
    if columns > narrowest:
        return f"tp·dim={columns} splits MLP columns and vocabulary; the narrowest has {narrowest}"
    for rule in (_broken_dim_rule, _broken_cp_rule, _broken_expert_rule):
        broken = rule(plan, layers)
        if broken is not None:
            return broken
    if not spec.causal and plan.micro_batches > max(sequences // plan.dp, 1):
        return (
            f"micro_batches={plan.micro_batches} cuts sequences ({sequences} over dp={plan.dp}), "
            "which needs a causal model"
        )
    return None


def _broken_expert_rule(plan: Plan, layers: Sequence[LayerSpec]) -> str | None:
    """Return what is wrong with a plan's ep and etp, or None."""
    ep, etp = plan.ep, plan.expert_columns
    sparse = [layer for layer in layers if layer.experts]
    if not sparse:
        if ep > 1 or plan.etp not in (None, 1):
            return f"ep={ep},etp={etp} split experts; the model has none"
        return None
    fewest = min(layer.experts for layer in sparse)
    if ep > fewest:
        return f"ep={ep} splits whole experts; the model has {fewest}"
    narrowest = min(layer.mlp_hidden for layer in sparse)
    if etp > narrowest:
        return f"etp={etp} splits an expert's columns; the narrowest has {narrowest}"
    if (plan.tp * plan.dim) % etp:
        return (
            f"etp={etp} splits experts over ranks that hold the same rows, so it divides "
            f"tp·dim={plan.tp * plan.dim}"
        )
    if plan.stage_ranks % (ep * etp):
        return f"ep·etp={ep}·{etp} divides dp·cp·tp·dim={plan.stage_ranks}, the ranks of a stage"
    return None


def _broken_dim_rule(plan: Plan, layers: Sequence[LayerSpec]) -> str | None:
    """Return what is wrong with slicing heads, or None."""
    if plan.dim == 1:
        return None
    fewest = min(min(_pairs(layer), layer.value_dim) for layer in layers)
    if plan.dim > fewest:
        return (
            f"dim={plan.dim} slices heads between pairs that RoPE turns together; the narrowest "
            f"head has {fewest}"
        )
    if plan.dim_algo in ("reduce", "independent") and any(layer.qk_norm for layer in layers):
        return f"dim_algo={plan.dim_algo} never sees whole heads, which q/k-norm acts on"
    return None


def _pairs(layer: LayerSpec) -> int:
    """Return the parts of a q/k head that cannot be sliced further."""
    return layer.rotated_dim // 2 or layer.head_dim


def _broken_cp_rule(plan: Plan, layers: Sequence[LayerSpec]) -> str | None:
    """Return what is wrong with how tokens of a sequence are split, or None."""
    if plan.cp_scheme == "ulysses" and plan.ulysses not in (1, plan.cp):
        return f"cp_scheme=ulysses is ulysses=cp={plan.cp}; got ulysses={plan.ulysses}"
    exchange = plan.head_exchange
    if plan.cp % exchange:
        return f"ulysses={exchange} divides cp={plan.cp}"
    fewest = min(layer.heads // plan.tp for layer in layers)
    if exchange > fewest:
        return f"ulysses={exchange} splits the heads of a tp rank; the fewest are {fewest}"
    windows = any(layer.window for layer in layers)
    if windows and plan.balance == "zigzag" and (plan.cp > exchange or plan.splits_queries):
        return "balance=zigzag undoes a sliding window; use balance=contiguous"
    return None


def check_plan(
    plan: Plan, spec: ModelSpec, world: int, sequences: int, tokens: int | None = None
) -> None:
    """Refuse a plan that does not fit `world` ranks, the model or a batch.

    Args:
        plan: to check.
        spec: the model.
        world: ranks.
        sequences: of the batch.
        tokens: of all of them; None where they are not known.

    Purely local arithmetic: nothing is sent, and every rank comes to the same verdict.

    Raises:
        PlanError: names the rule and the nearest plans that would work.
    """
    rule = broken_rule(plan, spec, sequences)
    if plan.world != world:
        degrees = "·".join(f"{axis}={getattr(plan, axis)}" for axis in AXES)
        rule = f"{degrees} takes {plan.world} ranks; this run has {world}"
    fitting = plan
    if rule is None and tokens is not None and plan.micro_batches > tokens:
        rule = (
            f"micro_batches={plan.micro_batches} leaves some empty: the batch has {tokens} tokens"
        )
        fitting = msgspec.structs.replace(plan, micro_batches=1)
    if rule is None:
        return
    near = nearest_plans(fitting, spec, world, sequences)
    advice = (
        f"nearest plans that work on {world}: {'; '.join(map(str, near))}"
        if near
        else (f"no plan of this version runs this model on {world} ranks")
    )
    raise PlanError(f"plan {plan}: {rule}. {advice}")


def idle_ranks(plan: Plan, lengths: Sequence[int]) -> int:
    """Return how many ranks hold no token of a batch.

    They have sequences too few for `dp`, or tokens too few for `cp`; with `ep` they may still work
    on rows of other ranks.
    """
    empty = sum(
        part.rows == 0
        for of_dp in split_batch(lengths, plan.dp)
        for part in split_tokens(of_dp, plan.cp, plan.balance)
    )
    return empty * plan.world // (plan.dp * plan.cp)


def told_idle(plan: Plan, idle: int) -> str:
    """Return a line on ranks that hold no token."""
    return (
        f"{plan}: {idle:,} of {plan.world:,} ranks hold no tokens; the batch has too few sequences "
        "for dp, or tokens for cp"
    )


def nearest_plans(
    plan: Plan, spec: ModelSpec, world: int, sequences: int, count: int = 3
) -> list[Plan]:
    """Return up to `count` plans that fit, by the summed |log2| ratio of their degrees."""

    def distance(other: Plan) -> float:
        axes = (*AXES, "ep")
        return sum(abs(math.log2(getattr(other, a) / getattr(plan, a))) for a in axes)

    balance: Balance = "contiguous" if any(b.window for b in spec.blocks) else plan.balance
    micro_batches = plan.micro_batches if spec.causal else 1
    candidates = (
        msgspec.structs.replace(candidate, micro_batches=micro_batches, balance=balance, ep=ep)
        for candidate in all_plans(world)
        for ep in {1, plan.ep}
    )
    fitting = (p for p in candidates if broken_rule(p, spec, sequences) is None)
    return sorted(fitting, key=distance)[:count]


def all_plans(world: int) -> Iterator[Plan]:
    """Yield every way to write `world` as a product of the five axes."""
    for pp, dp, cp, tp in itertools.product(_divisors(world), repeat=4):
        if world % (pp * dp * cp * tp) == 0:
            yield Plan(pp=pp, dp=dp, cp=cp, tp=tp, dim=world // (pp * dp * cp * tp))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _most(ranks: int, limit: int) -> int:
    """Return the largest divisor of `ranks` that is at most `limit`."""
    return max(d for d in _divisors(ranks) if d <= limit)


def family_plan(family: str, spec: ModelSpec, world: int) -> Plan:
    """Return the plan of a studied system for any number of ranks.

    baseline: pp=2 if the ranks are even and there are two layers, tp takes the rest as far as
    there are heads, dp what remains; experts whole on as many ranks of a stage as possible.
    grid: tp and dim share the ranks, the squarest way.
    ring: cp takes all ranks. ring-ep: the same with the experts spread over them.
    experts: dp takes all ranks, and the experts are spread over them.
    stages: pp takes as many ranks as there are layers for, dp the rest. stages-tp: tp takes the
    rest as far as there are heads, dp what remains.

    Raises:
        PlanError: no such family.
    """
    experts = min((block.experts for block in spec.blocks if block.experts), default=1)
    heads = min(block.heads for block in spec.blocks)

    def most_ep(ranks: int) -> int:
        return _most(ranks, experts)

    if family == "ring":
        return Plan(cp=world)
    if family == "grid":
        slices = min(min(_pairs(block), block.value_dim) for block in spec.blocks)
        shapes = [(d, world // d) for d in _divisors(world) if d <= heads and world // d <= slices]
        if not shapes:
            raise PlanError(f"family grid: {world} ranks are more than heads × slices")
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
