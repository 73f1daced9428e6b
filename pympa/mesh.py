"""Plans and the process mesh: which rank does what.

A plan is one short string (`tp=8,pp=2`); the mesh places `pp·dp·cp·tp·dim` ranks on five named
axes, pp slowest and dim fastest. Layers with experts see the ranks of a stage in another way: as
blocks of `ep·etp` neighbours, each block with all experts once, etp fastest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from pympa.layout import Balance
from pympa.spec import LayerSpec, ModelSpec

AXES = ("pp", "dp", "cp", "tp", "dim")
EXPERT_AXES = ("ep", "etp")
_WRITTEN_ORDER = ("cp", "tp", "dim", "pp", "dp", "ep", "etp")
FAMILIES = ("baseline", "ring", "ring-ep", "experts")


class PlanError(ValueError):
    """A plan that is malformed, or does not fit the model or the number of ranks."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Degrees of the mesh axes and the schedule's options.

    Attributes:
        pp: pipeline stages (layers). dp: groups of sequences. cp: shares of a sequence's tokens.
        tp: groups of heads and of MLP columns. dim: slices of each head.
        ep: groups of experts. etp: column slices inside an expert; None means as many as ranks
            hold the same rows (tp·dim) if ep fits beside them (ep ≤ dp·cp), else 1.
        micro_batches: parts in time of a rank's batch; whole sequences if there are enough,
            else token chunks with K/V kept.
        balance: how `cp` splits a sequence.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    dim: int = 1
    ep: int = 1
    etp: int | None = None
    micro_batches: int = 1
    balance: Balance = "zigzag"

    @property
    def world(self) -> int:
        """Ranks the plan takes."""
        return self.pp * self.stage_ranks

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.dp * self.cp * self.tp * self.dim

    @property
    def expert_columns(self) -> int:
        """Column slices inside an expert: `etp`, or what its default comes to."""
        if self.etp is not None:
            return self.etp
        return self.tp * self.dim if self.ep <= self.dp * self.cp else 1

    def degree(self, axis: str) -> int:
        """Return the number of ranks along one of `AXES` or `EXPERT_AXES`."""
        return self.expert_columns if axis == "etp" else int(getattr(self, axis))

    def __str__(self) -> str:
        values = [(axis, getattr(self, axis)) for axis in _WRITTEN_ORDER]
        degrees = [f"{a}={v}" for a, v in values if v is not None and (v > 1 or a == "etp")]
        if self.micro_batches != 1:
            degrees.append(f"micro_batches={self.micro_batches}")
        if self.balance != "zigzag":
            degrees.append(f"balance={self.balance}")
        return ",".join(degrees) or "tp=1"


def parse_plan(text: str) -> Plan:
    """Parse `tp=8,pp=2` and the like.

    Raises:
        PlanError: a part is not key=value, a key is unknown or repeated, a value not allowed.
    """
    fields: dict[str, int | str] = {}
    for part in text.replace(" ", "").split(","):
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise PlanError(f"plan {text!r}: expected key=value, as in 'tp=8,pp=2'; got {part!r}")
        if key in fields:
            raise PlanError(f"plan {text!r}: {key} is given twice")
        if key == "balance":
            if value not in ("zigzag", "contiguous"):
                raise PlanError(f"plan {text!r}: balance is zigzag or contiguous; got {value!r}")
            fields[key] = value
        elif key in Plan.__struct_fields__:
            if not value.isdecimal() or int(value) < 1:
                raise PlanError(f"plan {text!r}: {key} is a number of at least 1; got {value!r}")
            fields[key] = int(value)
        else:
            allowed = ", ".join(Plan.__struct_fields__)
            raise PlanError(f"plan {text!r}: no axis or option is called {key!r}; use {allowed}")
    return msgspec.convert(fields, Plan)


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
    if plan.tp > narrowest:
        return f"tp={plan.tp} splits MLP columns and vocabulary; the narrowest has {narrowest}"
    rule = missing_axis(plan) or _broken_expert_rule(plan, layers)
    if rule is not None:
        return rule
    if plan.cp > 1 and plan.balance == "zigzag" and any(layer.window for layer in layers):
        return "balance=zigzag undoes a sliding window; use balance=contiguous"
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


def missing_axis(plan: Plan) -> str | None:
    """Return what this version cannot do of any model, or None."""
    if plan.dim > 1:
        return f"dim={plan.dim}: this version splits whole heads only (dim=1)"
    return None


def check_plan(plan: Plan, spec: ModelSpec, world: int, sequences: int) -> None:
    """Refuse a plan that does not fit `world` ranks, the model or a batch of `sequences`.

    Purely local arithmetic: nothing is sent, and every rank comes to the same verdict.

    Raises:
        PlanError: names the rule and the nearest plans that would work.
    """
    rule = broken_rule(plan, spec, sequences)
    if plan.world != world:
        degrees = "·".join(f"{axis}={getattr(plan, axis)}" for axis in AXES)
        rule = f"{degrees} takes {plan.world} ranks; this run has {world}"
    if rule is None:
        return
    near = nearest_plans(plan, spec, world, sequences)
    advice = (
        f"nearest plans that work on {world}: {'; '.join(map(str, near))}"
        if near
        else (f"no plan of this version runs this model on {world} ranks")
    )
    raise PlanError(f"plan {plan}: {rule}. {advice}")


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


def family_plan(family: str, spec: ModelSpec, world: int) -> Plan:
    """Return the plan of a studied system for any number of ranks.

    baseline: pp=2 if the ranks are even and there are two layers, tp takes the rest as far as
    there are heads, dp what remains; experts whole on as many ranks of a stage as possible.
    ring: cp takes all ranks. ring-ep: the same with the experts spread over them.
    experts: dp takes all ranks, and the experts are spread over them.

    Raises:
        PlanError: no such family.
    """
    experts = min((block.experts for block in spec.blocks if block.experts), default=1)

    def most_ep(ranks: int) -> int:
        return max(d for d in _divisors(ranks) if d <= experts)

    if family == "ring":
        return Plan(cp=world)
    if family == "ring-ep":
        return Plan(cp=world, ep=most_ep(world))
    if family == "experts":
        return Plan(dp=world, ep=most_ep(world))
    if family == "baseline":
        pp = 2 if world % 2 == 0 and len(spec.blocks) >= 2 else 1
        heads = min(block.heads for block in spec.blocks)
        tp = max(d for d in _divisors(world // pp) if d <= heads)
        return Plan(pp=pp, tp=tp, dp=world // (pp * tp), ep=most_ep(world // pp))
    raise PlanError(f"family: expected one of {', '.join(FAMILIES)}; got {family!r}")


@dataclass(frozen=True)
class Mesh:
    """One rank's place among `plan.world` ranks.

    Attributes:
        plan: the degrees.
        rank: index in 0..world.
    """

    plan: Plan
    rank: int

    def coordinate(self, axis: str) -> int:
        """Return this rank's index along `axis`, one of `AXES` or `EXPERT_AXES`."""
        return self.rank // self._stride(axis) % self.plan.degree(axis)

    def group(self, axis: str) -> tuple[int, ...]:
        """Return the ranks that differ from this one along `axis` only, in order.

        `ep` and `etp` stand for the other four axes of a stage, not beside them.
        """
        stride, size = self._stride(axis), self.plan.degree(axis)
        first = self.rank - self.coordinate(axis) * stride
        return tuple(first + i * stride for i in range(size))

    def _stride(self, axis: str) -> int:
        if axis in EXPERT_AXES:
            return self.plan.expert_columns if axis == "ep" else 1
        faster = AXES[AXES.index(axis) + 1 :]
        return math.prod(getattr(self.plan, a) for a in faster)
