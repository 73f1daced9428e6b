"""Plans and the process mesh: which rank does what.

A plan is one short string (`tp=8,pp=2`); the mesh places `pp·dp·cp·tp·dim` ranks on five named
axes, pp slowest and dim fastest. Layers with experts see the ranks of a stage in another way: as
blocks of `ep·etp` neighbours, each block with all experts once, etp fastest. Some groups belong to
two axes or to a part of one: `columns` are the tp·dim neighbours that hold the same rows, and `cp`
falls into groups of `ulysses` neighbours and rings of one rank from each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgspec

from pympa.layout import Balance

AXES = ("pp", "dp", "cp", "tp", "dim")
EXPERT_AXES = ("ep", "etp")
CpScheme = Literal["ring", "ulysses", "allgather"]
DimAlgo = Literal["exchange", "gather", "reduce", "independent"]
_CHOICES: dict[str, Any] = {"balance": Balance, "cp_scheme": CpScheme, "dim_algo": DimAlgo}
_WRITTEN_ORDER = ("cp", "tp", "dim", "pp", "dp", "ep", "etp")


MOST = 1 << 20
"""Of any degree."""


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
        cp_scheme: how queries meet the keys of other `cp` ranks: blocks go round a ring, or are
            gathered first, or heads are exchanged for tokens (DeepSpeed Ulysses, Jacobs et al.
            2023), which is ulysses=cp.
        ulysses: neighbours of `cp` that exchange heads for tokens; rings go between such groups.
        dim_algo: how slices of a head work together: queries are exchanged for whole heads and
            keys gathered; q and k are gathered; scores are summed; or each slice attends alone,
            which is another model.
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
    cp_scheme: CpScheme = "ring"
    ulysses: int = 1
    dim_algo: DimAlgo = "exchange"

    @property
    def exact(self) -> bool:
        """The plan computes the model itself, not another one."""
        return self.dim == 1 or self.dim_algo != "independent"

    @property
    def head_exchange(self) -> int:
        """Neighbours of `cp` that exchange heads for tokens: `ulysses`, or all of `cp`."""
        return self.cp if self.cp_scheme == "ulysses" else self.ulysses

    @property
    def splits_queries(self) -> bool:
        """The ranks of `dim` attend to different rows."""
        return self.dim > 1 and self.dim_algo == "exchange"

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
        """Return the number of ranks along an axis, or in one of the groups beside them."""
        derived = {
            "etp": self.expert_columns,
            "columns": self.tp * self.dim,
            "ulysses": self.head_exchange,
            "ring": self.cp // self.head_exchange,
        }
        return derived[axis] if axis in derived else int(getattr(self, axis))

    def __str__(self) -> str:
        values = [(axis, getattr(self, axis)) for axis in _WRITTEN_ORDER]
        degrees = [f"{a}={v}" for a, v in values if v is not None and (v > 1 or a == "etp")]
        if self.micro_batches != 1:
            degrees.append(f"micro_batches={self.micro_batches}")
        if self.ulysses != 1:
            degrees.append(f"ulysses={self.ulysses}")
        for option in _CHOICES:
            value = getattr(self, option)
            if value != get_args(_CHOICES[option])[0]:
                degrees.append(f"{option}={value}")
        return ",".join(degrees) or "tp=1"


def parse_plan(text: str) -> Plan:
    """Parse `tp=8,pp=2` and the like.

    Raises:
        PlanError: a part is not key=value, a key is unknown or repeated, a value not allowed.
    """
    fields: dict[str, int | str] = {}
    for part in text.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not value or any(map(str.isspace, key + value)):
            raise PlanError(f"plan {text!r}: expected key=value, as in 'tp=8,pp=2'; got {part!r}")
        if key in fields:
            raise PlanError(f"plan {text!r}: {key} is given twice")
        if key in _CHOICES:
            choices = get_args(_CHOICES[key])
            if value not in choices:
                allowed = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise PlanError(f"plan {text!r}: {key} is {allowed}; got {value!r}")
            fields[key] = value
        elif key in Plan.__struct_fields__:
            if not (value.isascii() and value.isdecimal()) or float(value) < 1:
                raise PlanError(f"plan {text!r}: {key} is a number of at least 1; got {value!r}")
            if float(value) > MOST:
                raise PlanError(f"plan: {key} is a number of at most {MOST:,}; got {value}")
            fields[key] = int(value)
        else:
            allowed = ", ".join(Plan.__struct_fields__)
            raise PlanError(f"plan {text!r}: no axis or option is called {key!r}; use {allowed}")
    return msgspec.convert(fields, Plan)


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
        """Return this rank's index along an axis, or in one of the groups beside them."""
        return self.rank // self._stride(axis) % self.plan.degree(axis)

    def group(self, axis: str) -> tuple[int, ...]:
        """Return the ranks that differ from this one along `axis` only, in order.

        `ep` and `etp` stand for the other four axes of a stage, `columns` for `tp` and `dim`, and
        `ulysses` and `ring` for `cp`, not beside them.
        """
        stride, size = self._stride(axis), self.plan.degree(axis)
        first = self.rank - self.coordinate(axis) * stride
        return tuple(first + i * stride for i in range(size))

    def _stride(self, axis: str) -> int:
        plan = self.plan
        derived = {
            "ep": plan.expert_columns,
            "etp": 1,
            "columns": 1,
            "ulysses": plan.tp * plan.dim,
            "ring": plan.tp * plan.dim * plan.head_exchange,
        }
        if axis in derived:
            return derived[axis]
        faster = AXES[AXES.index(axis) + 1 :]
        return math.prod(getattr(self.plan, a) for a in faster)
