"""Is a run right? Every branch against the float64 oracle, by norm and by worst row.

What is allowed is in `pympa.contract`. NaN never passes. An output that breaks its limits is held
against emulations of what rounding alone does to this very model: narrow or deep models amplify it
by more than √layers. One emulation is a draw, as the run is, so there are more where one does not
do.

Where the gate logits of two experts nearly tie, rounding decides which one a row takes. So the
oracle takes the run's choices, after checking each: its logit must reach the oracle's own k-th
largest but for `ROUTING_DEVIATIONS` times what the tolerance of the layer moves a logit by, or what
rounding alone does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa import reference
from pympa.collect import LOGITS, ROUTING, Outputs
from pympa.contract import (
    CHANCE,
    F64,
    MOST_FACTOR,
    TOLERANCE,
    WORST_ROW_FACTOR,
    RowErrors,
    Yardstick,
    broken_limits,
    growth,
    whole_limit,
)
from pympa.spec import ModelSpec
from pympa.weights import PhiloxSource, model_weights

ROUTING_DEVIATIONS = 4.0
MOST_DRAWS = 8  # emulations of rounding; the error of a row may come from one score, so of one draw


@dataclass(frozen=True)
class BranchError:
    """How far one output is from the oracle.

    Attributes:
        name: the output. norm: relative error of the whole. worst_row: of the worst row.
        tolerance: allowed norm; the worst row may be `WORST_ROW_FACTOR` times that.
        broken: a sentence for each limit that it breaks, with the numbers.
    """

    name: str
    norm: float
    worst_row: float
    tolerance: float
    broken: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Of the tolerance; infinite for NaN."""
        share = max(self.norm, self.worst_row / WORST_ROW_FACTOR) / self.tolerance
        return math.inf if math.isnan(share) else share

    def __str__(self) -> str:
        return f"{self.name}: {'; '.join(self.broken) or 'within the contract'}"


@dataclass(frozen=True)
class Verdict:
    """All outputs of a run against the oracle.

    Attributes:
        errors: one for each output.
        rows: errors of the rows of each, by name; for a run that others are held against.
        sampled_rows: query rows checked where the whole oracle would not fit; None means all.
    """

    errors: tuple[BranchError, ...]
    rows: Mapping[str, RowErrors] = field(default_factory=dict, repr=False)
    sampled_rows: int | None = None

    @property
    def failed(self) -> tuple[BranchError, ...]:
        """Outputs that break the contract, the furthest from it first."""
        failed = (error for error in self.errors if error.broken)
        return tuple(sorted(failed, key=lambda error: -error.share))

    @property
    def passed(self) -> bool:
        """Every output is within the contract."""
        return not self.failed

    @property
    def worst(self) -> BranchError:
        """The output that comes closest to its tolerance, or passes it by most."""
        return max(self.errors, key=lambda error: error.share)

    @property
    def summary(self) -> Verdict:
        """The same without rows, for other ranks."""
        return replace(self, rows={})


Truth = Mapping[str, NDArray[np.float64]]
"""Outputs of the oracle, by name; see `oracle`."""


def routing_of(run: Outputs) -> dict[str, NDArray[Any]]:
    """Return a run's choices of experts, by name; nothing for a dense model."""
    return {name: array for name, array in run.items() if name.endswith(ROUTING)}


def oracle(
    spec: ModelSpec,
    dtype: np.dtype[Any],
    source: PhiloxSource,
    ids: Sequence[NDArray[np.int32]],
    routing: Mapping[str, NDArray[Any]] | None = None,
    rounding: reference.Rounding = reference.exactly,
) -> Truth:
    """Return the float64 outputs of the whole model, with weights rounded to `dtype`.

    Args:
        spec: the model.
        dtype: of the run.
        source: of the weights.
        ids: token ids of each sequence.
        routing: the run's choices of experts, from `routing_of`; None means the oracle's own.
        rounding: what is rounded, and how; none in the oracle, as a run's dtype in an emulation.
    """
    if routing is not None and not all(
        _is_choice(routing[f"layers.{i}.{ROUTING}"], layer.experts)
        for i, layer in enumerate(spec.blocks)
        if layer.experts
    ):
        routing = None  # nothing to follow; `compare` will say so
    weights = oracle_weights(spec, dtype, source)
    outputs, logits = reference.forward(spec, weights, ids, routing, rounding)
    return {**outputs, LOGITS: logits}


def _is_choice(chosen: NDArray[Any], experts: int) -> bool:
    """Tell whether rows name different experts in ascending order."""
    ascending = bool((np.diff(chosen, axis=1) > 0).all())
    return ascending and bool(((chosen >= 0) & (chosen < experts)).all())


def oracle_weights(
    spec: ModelSpec, dtype: np.dtype[Any], source: PhiloxSource
) -> Callable[[str], NDArray[np.float64]]:
    """Return global name -> rounded weight as float64, made when asked for."""
    specs = model_weights(spec)
    return lambda name: source.full(specs[name], dtype)


def compare(
    spec: ModelSpec,
    dtype: np.dtype[Any],
    run: Outputs,
    truth: Truth,
    one_rank: Verdict | None = None,
    rounded: Callable[[reference.Rounding], Truth] | None = None,
) -> Verdict:
    """Judge a run.

    Args:
        spec: the model.
        dtype: of the run; sets the tolerance.
        run: from `collect`.
        truth: from `oracle`.
        one_rank: the verdict on the same model on one rank, for the distributed contract.
        rounded: gives the outputs of `oracle` with rounding; asked where a limit is broken.
    """
    rows = {name: RowErrors.of(run[name], truth[name]) for name in truth if _is_float(name)}
    chance = CHANCE / len(truth)

    def judge(name: str, draws: Sequence[RowErrors]) -> BranchError:
        tolerance = TOLERANCE[dtype.name] * growth(name, spec)
        rounding = Yardstick.of_rounding(draws, spec, chance) if draws else None
        if not _is_float(name):
            return routing_error(name, run[name], truth[name], tolerance, rounding)
        alone = Yardstick.of_one_rank(one_rank.rows[name], spec, chance) if one_rank else None
        return branch_error(name, rows[name], tolerance, alone, rounding)

    errors = {name: judge(name, ()) for name in truth}
    draws: dict[str, list[RowErrors]] = {name: [] for name in truth}
    for rounding in _emulations(dtype, errors):
        if rounded is None:
            break
        emulated = rounded(rounding)
        for name in [error.name for error in errors.values() if error.broken]:
            draws[name].append(RowErrors.of(emulated[name], truth[name]))
            errors[name] = judge(name, draws[name])
        del emulated  # before there is another
    return Verdict(tuple(errors.values()), rows)


def _emulations(
    dtype: np.dtype[Any], errors: Mapping[str, BranchError]
) -> Iterator[reference.Rounding]:
    """Yield ways to round while outputs break their limits, unless one is beyond all hope."""
    for draw in range(MOST_DRAWS):
        broken = [error for error in errors.values() if error.broken]
        if broken and (draw == 0 or all(e.norm <= MOST_FACTOR * e.tolerance for e in broken)):
            yield reference.RoundingTo(dtype, draw)


def _is_float(name: str) -> bool:
    return not name.endswith(ROUTING)


def compare_sampled(
    spec: ModelSpec,
    dtype: np.dtype[Any],
    run: Outputs,
    source: PhiloxSource,
    ids: NDArray[np.int32],
    rows: NDArray[np.int64],
) -> Verdict:
    """Judge some rows of one sequence, layer by layer, where the whole oracle would not fit.

    Each branch is computed in float64 from the run's own residual stream before it, so every
    output has passed one layer only and gets the tolerance of one.

    Args:
        spec: the model.
        dtype: of the run; sets the tolerance.
        run: outputs of that sequence alone, from `collect`.
        source: where the run's weights come from.
        ids: token ids of the sequence.
        rows: positions to check.
    """
    weight = oracle_weights(spec, dtype, source)
    tolerance, chance = TOLERANCE[dtype.name], CHANCE / (3 * len(spec.blocks) + 2)
    errors: dict[str, BranchError] = {}
    stream = weight("embedding")[ids].astype(dtype)

    def settle(
        name: str,
        judge: Callable[[Yardstick | None], BranchError],
        emulated: Callable[[reference.Rounding], RowErrors],
    ) -> None:
        found, draws = {name: judge(None)}, []
        for rounding in _emulations(dtype, found):
            draws.append(emulated(rounding))
            found[name] = judge(Yardstick.of_rounding(draws, spec, chance))
        errors.update(found)

    def check(name: str, values: NDArray[Any], exact: Callable[[reference.Rounding], F64]) -> None:
        truth = exact(reference.exactly)
        settle(
            name,
            lambda alone: branch_error(
                name, RowErrors.of(values, truth), tolerance, rounding=alone
            ),
            lambda rounding: RowErrors.of(exact(rounding), truth),
        )

    def check_routing(
        name: str, chosen: NDArray[Any], gates: Callable[[reference.Rounding], tuple[F64, F64]]
    ) -> None:
        logits, scale = gates(reference.exactly)
        truth = logits / scale[:, None]
        settle(
            name,
            lambda alone: routing_error(name, chosen, truth, tolerance, alone),
            lambda rounding: RowErrors.of(gates(rounding)[0] / scale[:, None], truth),
        )

    def add(branch: NDArray[Any]) -> NDArray[Any]:
        return (stream.astype(np.float32) + branch.astype(np.float32)).astype(dtype)

    for index, layer in enumerate(spec.blocks):
        block = functools.partial(_in_block, weight, index)
        name = f"layers.{index}.attention"
        before = stream.astype(np.float64)
        check(
            name,
            run[name][rows],
            functools.partial(reference.attention_branch, spec, layer, before, block, rows),
        )
        stream = add(run[name])
        name = f"layers.{index}.mlp"
        before = stream[rows].astype(np.float64)
        exact = functools.partial(reference.mlp_branch, layer, before, block)
        if layer.experts:
            chosen = run[f"layers.{index}.{ROUTING}"]
            gates = functools.partial(reference.gate_logits, layer, before, block)
            check_routing(f"layers.{index}.{ROUTING}", chosen[rows], gates)
            valid = _is_choice(chosen, layer.experts)
            chosen = chosen if valid else np.broadcast_to(np.arange(layer.top_k), chosen.shape)
            keep = reference.kept(layer, chosen)[rows]
            exact = functools.partial(
                reference.moe_branch, layer, before, block, chosen[rows], keep
            )
        check(name, run[name][rows], exact)
        stream = add(run[name])
    last, ends = stream[-1].astype(np.float64), stream[rows].astype(np.float64)
    check("output", run["output"][rows], lambda rounding: ends)
    check(LOGITS, run[LOGITS], functools.partial(reference.logits, spec, weight, last))
    return Verdict(tuple(errors.values()), sampled_rows=len(rows))


def _in_block(weight: Callable[[str], NDArray[Any]], index: int, name: str) -> NDArray[Any]:
    return weight(f"layers.{index}.{name}")


def branch_error(
    name: str,
    rows: RowErrors,
    tolerance: float,
    one_rank: Yardstick | None = None,
    rounding: Yardstick | None = None,
) -> BranchError:
    """Judge one output; see `broken_limits`."""
    broken = broken_limits(rows, tolerance, one_rank, rounding)
    allowed = whole_limit(tolerance, rounding).value
    return BranchError(name, rows.whole, rows.worst_row, allowed, tuple(broken))


def routing_error(
    name: str,
    chosen: NDArray[Any],
    logits: NDArray[np.float64],
    tolerance: float,
    rounding: Yardstick | None = None,
) -> BranchError:
    """Return how far rows' choices of experts are from the largest logits.

    Args:
        name: of the output.
        chosen: expert ids `[rows, top_k]`.
        logits: of the oracle, over their sensitivity `[rows, experts]`.
        tolerance: relative error that the gate's input may have.
        rounding: errors of `logits` in emulations of rounding: allowed in the same row as well.

    Returns:
        The shortfall of a chosen logit in the row that comes closest to its limit, or passes it by
        most, in the units of `tolerance`, as norm and worst row, and that limit; infinite if a row
        does not name different experts in ascending order.
    """
    worst, broken, source = 0.0, [], "the tolerance"
    if not _is_choice(chosen, logits.shape[1]):
        worst = math.inf
    elif len(chosen):
        least = np.sort(logits, axis=1)[:, -chosen.shape[1]]
        shortfall = least[:, None] - np.take_along_axis(logits, chosen, axis=1)
        found = shortfall.max(axis=1) / ROUTING_DEVIATIONS
        limits = np.full(len(found), tolerance)
        if rounding is not None:
            limits = np.maximum(limits, rounding.deviations(logits.shape[1]))
        row = int(np.argmax(found / limits))
        if limits[row] > tolerance:
            source = "what rounding alone does"
        worst, tolerance = max(float(found[row]), 0.0), float(limits[row])
    if not worst <= tolerance:
        broken.append(f"choices of experts off by {worst:.2e}, over {tolerance:.2e}, {source}")
    return BranchError(name, worst, worst, tolerance, tuple(broken))
