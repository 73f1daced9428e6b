"""A verdict on a run: the error of each output, and the limits that it breaks.

`verify.contract` defines the limits. NaN never passes. An output that breaks its limits is compared
with emulations of rounding alone in the same model, because narrow or deep models amplify rounding
by more than √layers. One emulation is a random draw, like the run; so more of them are made if one
is not enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.spec import LayerSpec
from pympa.verify import reference
from pympa.verify.contract import (
    MOST_FACTOR,
    WORST_ROW_FACTOR,
    ReferenceErrors,
    RowErrors,
    broken_limits,
    whole_limit,
)
from pympa.verify.oracle import is_choice

ROUTING_DEVIATIONS = 4.0
MOST_DRAWS = 8  # emulations of rounding; a row's error may come from one score, so from one draw


@dataclass(frozen=True)
class BranchError:
    """The error of one output against the oracle.

    Attributes:
        name: the name of the output.
        norm: the relative error of the whole output.
        worst_row: the largest relative error of a row.
        tolerance: the allowed norm; `WORST_ROW_FACTOR` times that is allowed for the worst row.
        broken: a sentence with the numbers for each limit that the output breaks.
    """

    name: str
    norm: float
    worst_row: float
    tolerance: float
    broken: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The error over the tolerance; infinite for NaN."""
        share = max(self.norm, self.worst_row / WORST_ROW_FACTOR) / self.tolerance
        return math.inf if math.isnan(share) else share

    def __str__(self) -> str:
        return f"{self.name}: {'; '.join(self.broken) or 'within the contract'}"


@dataclass(frozen=True)
class Verdict:
    """The errors of all outputs of a run.

    Attributes:
        errors: the error of each output.
        rows: the errors of each output's rows, by name, for comparison with other runs.
        sampled_rows: the number of checked query rows if not all are checked; None means all.
    """

    errors: tuple[BranchError, ...]
    rows: Mapping[str, RowErrors] = field(default_factory=dict, repr=False)
    sampled_rows: int | None = None

    @property
    def failed(self) -> tuple[BranchError, ...]:
        """The outputs that break the contract, the worst first."""
        failed = (error for error in self.errors if error.broken)
        return tuple(sorted(failed, key=lambda error: -error.share))

    @property
    def passed(self) -> bool:
        """Whether every output is within the contract."""
        return not self.failed

    @property
    def worst(self) -> BranchError:
        """The output that is closest to its tolerance, or exceeds it most."""
        return max(self.errors, key=lambda error: error.share)

    @property
    def summary(self) -> Verdict:
        """The same verdict without rows, for other ranks."""
        return replace(self, rows={})


def branch_error(
    name: str,
    rows: RowErrors,
    tolerance: float,
    one_rank: ReferenceErrors | None = None,
    rounding: ReferenceErrors | None = None,
) -> BranchError:
    """Judge one output; see `broken_limits`."""
    broken = broken_limits(rows, tolerance, one_rank, rounding)
    allowed = whole_limit(tolerance, rounding).value
    return BranchError(name, rows.whole, rows.worst_row, allowed, tuple(broken))


def routing_error(
    name: str,
    layer: LayerSpec,
    chosen: NDArray[Any],
    values: NDArray[np.float64],
    tolerance: float,
    rounding: ReferenceErrors | None = None,
) -> BranchError:
    """Return the error of rows' chosen experts: how much smaller their values are than the largest.

    Args:
        name: the name of the output.
        layer: the block.
        chosen: the expert ids `[rows, top_k]`.
        values: the oracle's values by which experts are chosen, over their sensitivity
            `[rows, experts]`.
        tolerance: the allowed relative error of the gate's input.
        rounding: the errors of `values` in emulations of rounding, which are allowed as well.

    Returns:
        The shortfall of a chosen value in the row that is closest to its limit, or exceeds it most,
        in the units of `tolerance`, as norm and worst row, and that limit; infinite if a row does
        not have `top_k` different experts in ascending order, or has some of too many groups.
    """
    worst, broken, source = 0.0, [], "the tolerance"
    if not is_choice(chosen, layer):
        worst = math.inf
    elif len(chosen):
        limits = np.full(len(chosen), tolerance)
        if rounding is not None:
            limits = np.maximum(limits, rounding.deviations(values.shape[1]))
        found = _shortfall(layer, chosen, values, limits) / ROUTING_DEVIATIONS
        row = int(np.argmax(found / limits))
        if limits[row] > tolerance:
            source = "the error of rounding alone"
        worst, tolerance = max(float(found[row]), 0.0), float(limits[row])
    if not worst <= tolerance:
        broken.append(
            f"error {worst:.2e} of the chosen experts' values exceeds {tolerance:.2e} ({source})"
        )
    return BranchError(name, worst, worst, tolerance, tuple(broken))


def _shortfall(
    layer: LayerSpec, chosen: NDArray[Any], values: NDArray[np.float64], limits: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return how far the least value of a chosen expert, or group, is below what it must be.

    A chosen expert must be among the `top_k` largest of the groups that the row may choose from.
    These are the groups of its experts, and those so far above the others that no error of the
    limit changes that. A group of a chosen expert must be among the `chosen_groups` largest.
    """
    routing, rows = layer.routing, np.arange(len(chosen))
    shortfall = np.zeros(len(chosen))
    if routing.chosen_groups < routing.groups:
        size = layer.experts // routing.groups
        used = np.zeros((len(chosen), routing.groups), bool)
        used[rows[:, None], chosen // size] = True
        of_groups = reference.group_values(layer, values)
        descending = -np.sort(-of_groups, axis=1)
        least, next_one = descending[:, routing.chosen_groups - 1 : routing.chosen_groups + 1].T
        per_value = 2.0 if routing.group_score == "top2" else 1.0  # errors of a sum
        shortfall = (least - np.where(used, of_groups, np.inf).min(axis=1)) / per_value
        shortfall[used.sum(axis=1) > routing.chosen_groups] = np.inf
        margin = per_value * ROUTING_DEVIATIONS * limits
        allowed = used | (of_groups > (next_one + margin)[:, None])
        values = np.where(np.repeat(allowed, size, axis=1), values, -np.inf)
    least = np.sort(values, axis=1)[:, -chosen.shape[1]]
    lowest = np.take_along_axis(values, chosen, axis=1).min(axis=1)
    worst: NDArray[np.float64] = np.maximum(shortfall, least - lowest)
    return worst


Judge = Callable[[str, Sequence[RowErrors]], BranchError]
"""A function that judges an output, given its errors in emulations of rounding."""

Emulate = Callable[[reference.Rounding, Sequence[str]], Mapping[str, RowErrors]]
"""A function that returns the errors of outputs in an emulation of rounding."""


def judge_all(
    names: Iterable[str], dtype: np.dtype[Any], judge: Judge, emulate: Emulate | None
) -> dict[str, BranchError]:
    """Judge outputs, and judge them again with emulations of rounding while some break limits.

    Args:
        names: the names of the outputs.
        dtype: the dtype of the run.
        judge: a function that judges an output.
        emulate: a function that emulates rounding; None emulates nothing.
    """
    draws: dict[str, list[RowErrors]] = {name: [] for name in names}
    errors = {name: judge(name, ()) for name in draws}
    if emulate is None:
        return errors
    for rounding in _emulations(dtype, errors):
        broken = [name for name, error in errors.items() if error.broken]
        for name, rows in emulate(rounding, broken).items():
            draws[name].append(rows)
            errors[name] = judge(name, draws[name])
    return errors


def _emulations(
    dtype: np.dtype[Any], errors: Mapping[str, BranchError]
) -> Iterator[reference.Rounding]:
    """Yield roundings while outputs break their limits, unless an error is far too large."""
    for draw in range(MOST_DRAWS):
        broken = [error for error in errors.values() if error.broken]
        if broken and (draw == 0 or all(e.norm <= MOST_FACTOR * e.tolerance for e in broken)):
            yield reference.RoundingTo(dtype, draw)
