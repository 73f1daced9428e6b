"""Compare every branch of a run with the float64 oracle, by norm and by worst row.

Where the gate logits of two experts are nearly equal, rounding decides which one a row chooses. So
the oracle uses the run's choices, after checking each: its logit must not be less than the oracle's
own k-th largest by more than `ROUTING_DEVIATIONS` times the effect of the layer's tolerance on a
logit, or the effect of rounding alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.model.weights import WeightSource
from pympa.spec import LayerSpec, ModelSpec
from pympa.verify import reference
from pympa.verify.collect import LOGITS, ROUTING, Outputs
from pympa.verify.contract import CHANCE, F64, TOLERANCE, ReferenceErrors, RowErrors, growth
from pympa.verify.oracle import Truth, is_choice, oracle_weights
from pympa.verify.verdict import BranchError, Verdict, branch_error, judge_all, routing_error


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
        dtype: the dtype of the run, which sets the tolerance.
        run: the outputs from `collect`.
        truth: the outputs from `oracle`.
        one_rank: the verdict on the same model on one rank, for the distributed contract.
        rounded: a function that returns the outputs of `oracle` with rounding; called if a limit is
            broken.
    """
    rows = {name: RowErrors.of(run[name], truth[name]) for name in truth if _is_float(name)}
    chance = CHANCE / len(truth)

    def judge(name: str, draws: Sequence[RowErrors]) -> BranchError:
        tolerance = TOLERANCE[dtype.name] * growth(name, spec)
        rounding = ReferenceErrors.of_rounding(draws, spec, chance) if draws else None
        if not _is_float(name):
            layer = spec.blocks[int(name.split(".")[1])]
            return routing_error(name, layer, run[name], truth[name], tolerance, rounding)
        alone = ReferenceErrors.of_one_rank(one_rank.rows[name], spec, chance) if one_rank else None
        return branch_error(name, rows[name], tolerance, alone, rounding)

    def emulate(rounding: reference.Rounding, names: Sequence[str]) -> dict[str, RowErrors]:
        emulated = rounded(rounding) if rounded is not None else {}
        return {name: RowErrors.of(emulated[name], truth[name]) for name in names}

    errors = judge_all(truth, dtype, judge, None if rounded is None else emulate)
    return Verdict(tuple(errors.values()), rows)


def _is_float(name: str) -> bool:
    return not name.endswith(ROUTING)


def compare_sampled(
    spec: ModelSpec,
    dtype: np.dtype[Any],
    run: Outputs,
    source: WeightSource,
    ids: NDArray[np.int32],
    rows: NDArray[np.int64],
) -> Verdict:
    """Judge some rows of one sequence, layer by layer, if the whole oracle would take too long.

    Each branch is computed in float64 from the run's own residual stream before it. So every output
    has passed through one layer only and gets the tolerance of one layer.

    Args:
        spec: the model.
        dtype: the dtype of the run, which sets the tolerance.
        run: the outputs of that sequence alone, from `collect`.
        source: the source of the run's weights.
        ids: the token ids of the sequence.
        rows: the positions to check.
    """
    weight = oracle_weights(spec, dtype, source)
    tolerance, chance = TOLERANCE[dtype.name], CHANCE / (3 * len(spec.blocks) + 2)
    errors: dict[str, BranchError] = {}
    stream = reference.embed(spec, weight, ids, dtype).astype(dtype)

    def settle(
        name: str,
        judge: Callable[[ReferenceErrors | None], BranchError],
        emulate: Callable[[reference.Rounding], RowErrors],
    ) -> None:
        def with_draws(_: str, draws: Sequence[RowErrors]) -> BranchError:
            return judge(ReferenceErrors.of_rounding(draws, spec, chance) if draws else None)

        errors.update(
            judge_all([name], dtype, with_draws, lambda rounding, _: {name: emulate(rounding)})
        )

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
        name: str,
        layer: LayerSpec,
        chosen: NDArray[Any],
        gates: Callable[[reference.Rounding], tuple[F64, F64]],
    ) -> None:
        values, scale = gates(reference.exactly)
        truth = values / scale[:, None]
        settle(
            name,
            lambda alone: routing_error(name, layer, chosen, truth, tolerance, alone),
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
        read, stream = stream, add(run[name])
        if not layer.parallel:
            read = stream
        name = f"layers.{index}.mlp"
        before = read[rows].astype(np.float64)
        exact = functools.partial(reference.mlp_branch, layer, before, block)
        if layer.experts:
            chosen = run[f"layers.{index}.{ROUTING}"]
            gates = functools.partial(reference.gate_values, layer, before, block)
            check_routing(f"layers.{index}.{ROUTING}", layer, chosen[rows], gates)
            if not is_choice(chosen, layer):
                chosen = np.broadcast_to(np.arange(layer.top_k), (len(chosen), layer.top_k))
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
