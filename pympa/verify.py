"""Is a run right? Every branch against the float64 oracle, by norm and by worst row.

What is allowed is in `pympa.contract`. NaN never passes. An output that breaks its tolerance is
held against an emulation, in float64, of what rounding alone does to this very model: narrow or
deep models amplify it by more than √layers.

Where the gate logits of two experts nearly tie, rounding decides which one a row takes. So the
oracle takes the run's choices, after checking each: its logit must reach the oracle's own k-th
largest but for `ROUTING_DEVIATIONS` times what the tolerance of the layer moves a logit by.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa import reference
from pympa.collect import LOGITS, ROUTING, Outputs
from pympa.contract import (
    TOLERANCE,
    WORST_ROW_FACTOR,
    RowErrors,
    Yardstick,
    broken_limits,
    growth,
    narrowest,
)
from pympa.spec import ModelSpec
from pympa.weights import PhiloxSource, model_weights

ROUTING_DEVIATIONS = 4.0


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
) -> Truth:
    """Return the float64 outputs of the whole model, with weights rounded to `dtype`.

    Args:
        spec: the model.
        dtype: of the run.
        source: of the weights.
        ids: token ids of each sequence.
        routing: the run's choices of experts, from `routing_of`; None means the oracle's own.
    """
    if routing is not None and not all(
        _is_choice(routing[f"layers.{i}.{ROUTING}"], layer.experts)
        for i, layer in enumerate(spec.blocks)
        if layer.experts
    ):
        routing = None  # nothing to follow; `compare` will say so
    outputs, logits = reference.forward(spec, oracle_weights(spec, dtype, source), ids, routing)
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
    rounded: Callable[[], Truth] | None = None,
) -> Verdict:
    """Judge a run.

    Args:
        spec: the model.
        dtype: of the run; sets the tolerance.
        run: from `collect`.
        truth: from `oracle`.
        one_rank: the verdict on the same model on one rank, for the distributed contract.
        rounded: gives the outputs of `oracle` with rounding; asked where a tolerance is broken.
    """
    rows = {name: RowErrors.of(run[name], truth[name]) for name in truth if _is_float(name)}
    width = narrowest(spec)
    emulated: dict[str, Yardstick] = {}

    def judge(name: str) -> BranchError:
        tolerance = TOLERANCE[dtype.name] * growth(name, spec)
        if not _is_float(name):
            return routing_error(name, run[name], truth[name], tolerance)
        errors, alone = rows[name], None
        if one_rank is not None:
            alone = Yardstick(one_rank.rows[name], width, "one rank")
        broken = broken_limits(errors, tolerance, alone)
        if broken and rounded is not None:
            if not emulated:
                emulated.update(_yardsticks(rounded(), truth, width))
            broken = broken_limits(errors, tolerance, alone, emulated[name])
        return BranchError(name, errors.whole, errors.worst_row, tolerance, tuple(broken))

    return Verdict(tuple(judge(name) for name in truth), rows)


def _yardsticks(rounded: Truth, truth: Truth, width: int) -> dict[str, Yardstick]:
    return {
        name: Yardstick(RowErrors.of(rounded[name], truth[name]), width, "rounding alone")
        for name in truth
        if _is_float(name)
    }


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
    tolerance = TOLERANCE[dtype.name]
    errors = []
    stream = weight("embedding")[ids].astype(dtype)

    def check(name: str, truth: NDArray[np.float64], values: NDArray[Any]) -> None:
        rows = RowErrors.of(values, truth)
        broken = tuple(broken_limits(rows, tolerance))
        errors.append(BranchError(name, rows.whole, rows.worst_row, tolerance, broken))

    def add(branch: NDArray[Any]) -> NDArray[Any]:
        return (stream.astype(np.float32) + branch.astype(np.float32)).astype(dtype)

    for index, layer in enumerate(spec.blocks):
        block = functools.partial(_in_block, weight, index)
        name = f"layers.{index}.attention"
        exact = stream.astype(np.float64)
        truth = reference.attention_branch(spec, layer, exact, block, rows)
        check(name, truth, run[name][rows])
        stream = add(run[name])
        name = f"layers.{index}.mlp"
        exact = stream[rows].astype(np.float64)
        if layer.experts:
            chosen = run[f"layers.{index}.{ROUTING}"]
            logits, scale = reference.gate_logits(layer, exact, block)
            at = f"layers.{index}.{ROUTING}"
            errors.append(routing_error(at, chosen[rows], logits / scale[:, None], tolerance))
            valid = _is_choice(chosen, layer.experts)
            chosen = chosen if valid else np.broadcast_to(np.arange(layer.top_k), chosen.shape)
            keep = reference.kept(layer, chosen)[rows]
            truth = reference.moe_branch(layer, exact, block, chosen[rows], keep)
        else:
            truth = reference.mlp_branch(layer, exact, block)
        check(name, truth, run[name][rows])
        stream = add(run[name])
    check("output", stream[rows].astype(np.float64), run["output"][rows])
    check(LOGITS, reference.logits(spec, weight, stream[-1].astype(np.float64)), run[LOGITS])
    return Verdict(tuple(errors), sampled_rows=len(rows))


def _in_block(weight: Callable[[str], NDArray[Any]], index: int, name: str) -> NDArray[Any]:
    return weight(f"layers.{index}.{name}")


def routing_error(
    name: str, chosen: NDArray[Any], logits: NDArray[np.float64], tolerance: float
) -> BranchError:
    """Return how far rows' choices of experts are from the largest logits.

    Args:
        name: of the output.
        chosen: expert ids `[rows, top_k]`.
        logits: of the oracle, over their sensitivity `[rows, experts]`.
        tolerance: relative error that the gate's input may have.

    Returns:
        The worst shortfall of a chosen logit in the units of `tolerance`, as norm and worst row;
        infinite if a row does not name different experts in ascending order.
    """
    worst = 0.0
    if not _is_choice(chosen, logits.shape[1]):
        worst = math.inf
    elif len(chosen):
        least = np.sort(logits, axis=1)[:, -chosen.shape[1]]
        shortfall = least[:, None] - np.take_along_axis(logits, chosen, axis=1)
        worst = max(float(shortfall.max()), 0.0) / ROUTING_DEVIATIONS
    broken = (
        f"a choice of experts is off by {worst:.2e}, over {tolerance:.2e}, the tolerance"
        if not worst <= tolerance
        else ""
    )
    return BranchError(name, worst, worst, tolerance, (broken,) if broken else ())
