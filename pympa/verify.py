"""Is a run right? Every branch against the float64 oracle, by norm and by worst row.

Error = ‖run - oracle‖ / ‖oracle‖ with the same rounded weights. A branch of layer l (from 1) may be
off by tolerance·√l as a whole and by 8 times that in its worst row. A distributed run must also
stay within 1.2 times the error of one rank, or a quarter of the tolerance. Logits have a row for
each sequence only, too few for a ratio of two errors to mean anything: they meet the tolerance.
NaN never passes.

Where the gate logits of two experts nearly tie, rounding decides which one a row takes. So the
oracle takes the run's choices, after checking each: its logit must reach the oracle's own k-th
largest but for `ROUTING_DEVIATIONS` times what the tolerance of the layer moves a logit by.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa import reference
from pympa.collect import LOGITS, ROUTING, Outputs
from pympa.spec import ModelSpec
from pympa.weights import PhiloxSource, model_weights

TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
WORST_ROW_FACTOR = 8.0
DISTRIBUTED_FACTOR = 1.2
DISTRIBUTED_SHARE = 0.25
ROUTING_DEVIATIONS = 4.0


@dataclass(frozen=True)
class BranchError:
    """How far one output is from the oracle.

    Attributes:
        name: the output. norm: relative error of the whole. worst_row: of the worst row.
        tolerance: allowed norm; the worst row may be `WORST_ROW_FACTOR` times that.
    """

    name: str
    norm: float
    worst_row: float
    tolerance: float

    def within(self, one_rank: BranchError | None = None) -> bool:
        """Tell whether the contract holds; `one_rank` adds the distributed part of it."""
        limits = [self.tolerance, WORST_ROW_FACTOR * self.tolerance]
        if one_rank is not None:
            limits = [
                min(limit, max(DISTRIBUTED_FACTOR * alone, DISTRIBUTED_SHARE * limit))
                for limit, alone in zip(limits, (one_rank.norm, one_rank.worst_row), strict=True)
            ]
        return self.norm <= limits[0] and self.worst_row <= limits[1]  # False for NaN


@dataclass(frozen=True)
class Verdict:
    """All outputs of a run against the oracle.

    Attributes:
        errors: one for each output.
        failed: those that break the contract.
        sampled_rows: query rows checked where the whole oracle would not fit; None means all.
    """

    errors: tuple[BranchError, ...]
    failed: tuple[BranchError, ...]
    sampled_rows: int | None = None

    @property
    def passed(self) -> bool:
        """Every output is within the contract."""
        return not self.failed

    @property
    def worst(self) -> BranchError:
        """The output that comes closest to its tolerance, or passes it by most."""
        return max(self.errors, key=lambda e: math.inf if e.norm != e.norm else _share(e))


def _share(error: BranchError) -> float:
    return max(error.norm, error.worst_row / WORST_ROW_FACTOR) / error.tolerance


def routing_of(run: Outputs) -> dict[str, NDArray[Any]]:
    """Return a run's choices of experts, by name; nothing for a dense model."""
    return {name: array for name, array in run.items() if name.endswith(ROUTING)}


def oracle(
    spec: ModelSpec,
    dtype: np.dtype[Any],
    source: PhiloxSource,
    ids: Sequence[NDArray[np.int32]],
    routing: Mapping[str, NDArray[Any]] | None = None,
) -> Mapping[str, NDArray[np.float64]]:
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
    truth: Mapping[str, NDArray[np.float64]],
    one_rank: Verdict | None = None,
) -> Verdict:
    """Judge a run.

    Args:
        spec: the model.
        dtype: of the run; sets the tolerance.
        run: from `collect`.
        truth: from `oracle`.
        one_rank: the verdict on the same model on one rank, for the distributed contract.
    """
    errors = tuple(
        (routing_error if name.endswith(ROUTING) else branch_error)(
            name, run[name], truth[name], TOLERANCE[dtype.name] * _growth(name, spec)
        )
        for name in truth
    )
    alone = {
        e.name: e
        for e in (one_rank.errors if one_rank else ())
        if e.name != LOGITS and not e.name.endswith(ROUTING)
    }
    failed = tuple(error for error in errors if not error.within(alone.get(error.name)))
    return Verdict(errors, failed)


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
        errors.append(branch_error(name, values, truth, tolerance))

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
    failed = tuple(error for error in errors if not error.within())
    return Verdict(tuple(errors), failed, sampled_rows=len(rows))


def _in_block(weight: Callable[[str], NDArray[Any]], index: int, name: str) -> NDArray[Any]:
    return weight(f"layers.{index}.{name}")


def branch_error(
    name: str, run: NDArray[Any], truth: NDArray[np.float64], tolerance: float
) -> BranchError:
    """Return the relative error of one output `[rows, width]`."""
    difference = np.linalg.norm(run.astype(np.float64) - truth, axis=1)
    size = np.linalg.norm(truth, axis=1)
    if not len(size):
        return BranchError(name, 0.0, 0.0, tolerance)
    with np.errstate(invalid="ignore", divide="ignore"):
        by_row = np.where(difference == 0, 0.0, difference / size)
        whole = np.linalg.norm(difference) / np.linalg.norm(size)
    return BranchError(name, float(whole), float(by_row.max()), tolerance)


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
    return BranchError(name, worst, worst, tolerance)


def _growth(name: str, spec: ModelSpec) -> float:
    """Return √(layers that the output has passed through)."""
    parts = name.split(".")
    return math.sqrt(int(parts[1]) + 1 if parts[0] == "layers" else len(spec.blocks))
