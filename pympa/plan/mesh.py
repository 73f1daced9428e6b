"""Plans, and the process mesh with the coordinates of each rank.

A plan is one short string (`tp=8,pp=2`); the mesh arranges `pp·dp·cp·tp·dim` ranks on five named
axes, pp slowest and dim fastest. Layers with experts arrange the ranks of a stage in another way:
as blocks of `ep·etp` neighbours, each block with all experts once, etp fastest. Some groups belong
to two axes or to a part of one: `columns` are the tp·dim neighbours with the same rows, and `cp` is
divided into groups of `ulysses` neighbours, and into rings of one rank from each group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgspec

from pympa.plan.layout import Balance

AXES = ("pp", "dp", "cp", "tp", "dim")
EXPERT_AXES = ("ep", "etp")
CpScheme = Literal["ring", "ulysses", "allgather"]
DimAlgo = Literal["exchange", "gather", "reduce", "independent"]
_CHOICES: dict[str, Any] = {"balance": Balance, "cp_scheme": CpScheme, "dim_algo": DimAlgo}
_WRITTEN_ORDER = ("cp", "tp", "dim", "pp", "dp", "ep", "etp")


MOST = 1 << 20
"""The largest degree of any axis."""


class PlanError(ValueError):
    """A plan is malformed, or does not fit the model or the number of ranks."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The degrees of the mesh axes, and the options.

    Attributes:
        pp: the number of pipeline stages (layers).
        dp: the number of groups of sequences.
        cp: the number of shares of a sequence's tokens.
        tp: the number of groups of heads and of MLP columns.
        dim: the number of slices of each head.
        ep: the number of groups of experts.
        etp: the number of column slices inside an expert; None means the number of ranks with the
            same rows (tp·dim) if ep ≤ dp·cp, otherwise 1.
        micro_batches: the number of parts of a rank's batch in time; whole sequences if there are
            enough, otherwise token chunks with K/V kept.
        balance: the split of a sequence over `cp`.
        cp_scheme: the way in which queries attend to the keys of other `cp` ranks: blocks are sent
            round a ring, or gathered first, or heads are exchanged for tokens (DeepSpeed Ulysses,
            Jacobs et al. 2023), which is ulysses=cp. In layers with a window the first two are the
            same: each rank gets only the keys that its queries see.
        ulysses: the number of neighbours of `cp` that exchange heads for tokens; rings connect such
            groups.
        dim_algo: the way in which slices of a head attend: queries are exchanged for whole heads
            and keys gathered; q and k are gathered; scores are summed; or each slice attends
            separately, which is another model.
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
        """Whether the plan computes the model itself, not another one."""
        return self.dim == 1 or self.dim_algo != "independent"

    @property
    def head_exchange(self) -> int:
        """The number of neighbours of `cp` that exchange heads for tokens: `ulysses`, or `cp`."""
        return self.cp if self.cp_scheme == "ulysses" else self.ulysses

    @property
    def splits_queries(self) -> bool:
        """Whether the ranks of `dim` attend with different rows."""
        return self.dim > 1 and self.dim_algo == "exchange"

    @property
    def world(self) -> int:
        """The number of ranks of the plan."""
        return self.pp * self.stage_ranks

    @property
    def stage_ranks(self) -> int:
        """The number of ranks of one pipeline stage."""
        return self.dp * self.cp * self.tp * self.dim

    @property
    def expert_columns(self) -> int:
        """The number of column slices inside an expert: `etp`, or its default."""
        if self.etp is not None:
            return self.etp
        return self.tp * self.dim if self.ep <= self.dp * self.cp else 1

    def degree(self, axis: str) -> int:
        """Return the number of ranks along an axis, or in one of the derived groups."""
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
        PlanError: a part is not key=value, a key is unknown or repeated, or a value is not allowed.
    """
    fields: dict[str, int | str] = {}
    for part in text.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not value or any(map(str.isspace, key + value)):
            raise PlanError(f"plan {text!r}: expected key=value, as in 'tp=8,pp=2'; got {part!r}")
        if key in fields:
            raise PlanError(f"plan {text!r}: {key}: expected once; got it twice")
        if key in _CHOICES:
            choices = get_args(_CHOICES[key])
            if value not in choices:
                allowed = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise PlanError(f"plan {text!r}: {key}: expected {allowed}; got {value!r}")
            fields[key] = value
        elif key in Plan.__struct_fields__:
            if not (value.isascii() and value.isdecimal()) or float(value) < 1:
                raise PlanError(
                    f"plan {text!r}: {key}: expected a number of at least 1; got {value!r}"
                )
            if float(value) > MOST:
                raise PlanError(f"plan: {key}: expected a number of at most {MOST:,}; got {value}")
            fields[key] = int(value)
        else:
            allowed = ", ".join(Plan.__struct_fields__)
            raise PlanError(
                f"plan {text!r}: expected axes and options out of {allowed}; got {key!r}"
            )
    return msgspec.convert(fields, Plan)


@dataclass(frozen=True)
class Mesh:
    """The coordinates of one rank among `plan.world` ranks.

    Attributes:
        plan: the degrees.
        rank: the number of the rank in 0..world.
    """

    plan: Plan
    rank: int

    def coordinate(self, axis: str) -> int:
        """Return this rank's index along an axis, or in one of the derived groups."""
        return self.rank // self._stride(axis) % self.plan.degree(axis)

    def group(self, axis: str) -> tuple[int, ...]:
        """Return the ranks that differ from this one only along `axis`, in order.

        `ep` and `etp` replace the other four axes of a stage, `columns` replaces `tp` and `dim`,
        and `ulysses` and `ring` replace `cp`.
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
