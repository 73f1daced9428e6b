"""Which plans can run, and the nearest plans that can.

This is local arithmetic: nothing is sent, and every rank gets the same result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from pympa.plan.enumerate import degree_choices
from pympa.plan.layout import split_batch, split_tokens
from pympa.plan.mesh import AXES, Plan, PlanError
from pympa.spec import LayerSpec, ModelSpec


def broken_rule(plan: Plan, spec: ModelSpec, sequences: int) -> str | None:
    """Return the rule that `plan` breaks for a batch of `sequences`, or None if it can run."""
    layers = spec.blocks
    if plan.pp > len(layers):
        return f"pp={plan.pp}: expected at most {len(layers)}, because each stage needs a layer"
    fewest_heads = min(layer.heads for layer in layers)
    if plan.tp > fewest_heads:
        return f"tp={plan.tp}: expected at most {fewest_heads}, the fewest heads of a layer"
    dense = (layer.mlp_hidden for layer in layers if not layer.experts)
    narrowest = min([spec.vocabulary, *dense])
    columns = plan.tp * plan.dim
    if columns > narrowest:
        return (
            f"tp·dim={columns}: expected at most {narrowest}, the fewest MLP columns or rows of "
            "the "
            "vocabulary"
        )
    for rule in (_broken_dim_rule, _broken_cp_rule, _broken_expert_rule):
        broken = rule(plan, layers)
        if broken is not None:
            return broken
    if not spec.causal and plan.micro_batches > max(sequences // plan.dp, 1):
        return (
            f"micro_batches={plan.micro_batches} cuts sequences ({sequences} over dp={plan.dp}): "
            "expected a causal model"
        )
    return None


def _broken_expert_rule(plan: Plan, layers: Sequence[LayerSpec]) -> str | None:
    """Return the rule that a plan's ep and etp break, or None."""
    ep, etp = plan.ep, plan.expert_columns
    sparse = [layer for layer in layers if layer.experts]
    if not sparse:
        if ep > 1 or plan.etp not in (None, 1):
            return f"ep={ep},etp={etp}: expected 1, because the model has no experts"
        return None
    fewest = min(layer.experts for layer in sparse)
    if ep > fewest:
        return f"ep={ep}: expected at most {fewest}, the fewest experts of a layer"
    widths = [layer.mlp_hidden for layer in sparse]
    narrowest = min(widths + [layer.shared_width for layer in sparse if layer.shared_experts])
    if etp > narrowest:
        return f"etp={etp}: expected at most {narrowest}, the fewest columns of an expert"
    if (plan.tp * plan.dim) % etp:
        return (
            f"etp={etp}: expected a divisor of tp·dim={plan.tp * plan.dim}, the number of ranks "
            "with "
            "the same rows"
        )
    if plan.stage_ranks % (ep * etp):
        return (
            f"ep·etp={ep}·{etp}: expected a divisor of dp·cp·tp·dim={plan.stage_ranks}, the number "
            "of ranks of a stage"
        )
    return None


def _broken_dim_rule(plan: Plan, layers: Sequence[LayerSpec]) -> str | None:
    """Return the rule that slices of heads break, or None."""
    if plan.dim == 1:
        return None
    fewest = min(min(head_pairs(layer), layer.value_dim) for layer in layers)
    if plan.dim > fewest:
        return (
            f"dim={plan.dim}: expected at most {fewest}, the most slices of the narrowest head, in "
            "which pairs that RoPE rotates stay together"
        )
    if plan.dim_algo in ("reduce", "independent") and any(
        layer.qk_norm == "head" for layer in layers
    ):
        return (
            f"dim_algo={plan.dim_algo}: expected exchange or gather, because q/k-norm needs whole "
            "heads"
        )
    return None


def head_pairs(layer: LayerSpec) -> int:
    """Return the number of parts of a q/k head that cannot be sliced further."""
    pairs, unrotated = layer.rotated_dim // 2, layer.head_dim - layer.rotated_dim
    if layer.latent is not None:
        return min(pairs, unrotated)  # each part has a weight of its own
    return pairs or unrotated


def _broken_cp_rule(plan: Plan, layers: Sequence[LayerSpec]) -> str | None:
    """Return the rule that the split of a sequence's tokens breaks, or None."""
    if plan.cp_scheme == "ulysses" and plan.ulysses not in (1, plan.cp):
        return (
            f"cp_scheme=ulysses: expected ulysses=1 or ulysses=cp={plan.cp}; "
            f"got ulysses={plan.ulysses}"
        )
    exchange = plan.head_exchange
    if plan.cp % exchange:
        return f"ulysses={exchange}: expected a divisor of cp={plan.cp}"
    fewest = min(layer.heads // plan.tp for layer in layers)
    if exchange > fewest:
        return f"ulysses={exchange}: expected at most {fewest}, the fewest heads of a tp rank"
    return None


def check_plan(
    plan: Plan, spec: ModelSpec, world: int, sequences: int, tokens: int | None = None
) -> None:
    """Refuse a plan that does not fit `world` ranks, the model or a batch.

    This is local arithmetic: nothing is sent, and every rank gets the same result.

    Args:
        plan: the plan to check.
        spec: the model.
        world: the number of ranks.
        sequences: the number of sequences of the batch.
        tokens: the number of tokens of all sequences; None if it is not known.

    Raises:
        PlanError: the plan breaks a rule; the message gives the rule and the nearest plans that
            work.
    """
    rule = broken_rule(plan, spec, sequences)
    if plan.world != world:
        degrees = "·".join(f"{axis}={getattr(plan, axis)}" for axis in AXES)
        rule = f"{degrees} needs {plan.world} ranks; this run has {world}"
    fitting = plan
    if rule is None and tokens is not None and plan.micro_batches > tokens:
        rule = (
            f"micro_batches={plan.micro_batches}: expected at most {tokens}, the tokens of the "
            "batch"
        )
        fitting = msgspec.structs.replace(plan, micro_batches=1)
    if rule is None:
        return
    near = nearest_plans(fitting, spec, world, sequences)
    advice = (
        f"nearest plans that work on {world} ranks: {'; '.join(map(str, near))}"
        if near
        else (f"no plan of this version runs this model on {world} ranks")
    )
    raise PlanError(f"plan {plan}: {rule}. {advice}")


def idle_ranks(plan: Plan, lengths: Sequence[int]) -> int:
    """Return the number of ranks that hold no token of a batch.

    There are too few sequences for `dp`, or tokens for `cp`; with `ep` such ranks may still compute
    rows of other ranks.
    """
    empty = sum(
        part.rows == 0
        for of_dp in split_batch(lengths, plan.dp)
        for part in split_tokens(of_dp, plan.cp, plan.balance)
    )
    return empty * plan.world // (plan.dp * plan.cp)


def idle_line(plan: Plan, idle: int) -> str:
    """Return a line about ranks that hold no token."""
    return (
        f"{plan}: {idle:,} of {plan.world:,} ranks hold no tokens; the batch has too few sequences "
        "for dp, or tokens for cp"
    )


def nearest_plans(
    plan: Plan, spec: ModelSpec, world: int, sequences: int, count: int = 3
) -> list[Plan]:
    """Return up to `count` plans that fit, nearest by the summed |log2| ratio of their degrees."""

    def distance(other: Plan) -> float:
        axes = (*AXES, "ep")
        return sum(abs(math.log2(getattr(other, a) / getattr(plan, a))) for a in axes)

    micro_batches = plan.micro_batches if spec.causal else 1
    candidates = (
        msgspec.structs.replace(candidate, micro_batches=micro_batches, balance=plan.balance, ep=ep)
        for candidate in degree_choices(world)
        for ep in {1, plan.ep}
    )
    fitting = (p for p in candidates if broken_rule(p, spec, sequences) is None)
    return sorted(fitting, key=distance)[:count]
