"""The oracle's outputs for a model, a batch and the experts that a run chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.model.weights import WeightSource, full_weight, model_weights
from pympa.spec import LayerSpec, ModelSpec
from pympa.verify import reference
from pympa.verify.collect import LOGITS, ROUTING, Outputs

Truth = Mapping[str, NDArray[np.float64]]
"""The outputs of the oracle, by name; see `oracle`."""


def routing_of(run: Outputs) -> dict[str, NDArray[Any]]:
    """Return a run's chosen experts, by name; empty for a dense model."""
    return {name: array for name, array in run.items() if name.endswith(ROUTING)}


def oracle(
    spec: ModelSpec,
    dtype: np.dtype[Any],
    source: WeightSource,
    ids: Sequence[NDArray[np.int32]],
    routing: Mapping[str, NDArray[Any]] | None = None,
    rounding: reference.Rounding = reference.exactly,
) -> Truth:
    """Return the float64 outputs of the whole model, with weights rounded to `dtype`.

    Args:
        spec: the model.
        dtype: the dtype of the run.
        source: the source of the weights.
        ids: the token ids of each sequence.
        routing: the run's chosen experts, from `routing_of`; None means the oracle's own.
        rounding: the rounding of arrays and sums; by default exact, in an emulation that of a run.
    """
    if routing is not None and not all(
        is_choice(routing[f"layers.{i}.{ROUTING}"], layer)
        for i, layer in enumerate(spec.blocks)
        if layer.experts
    ):
        routing = None  # invalid choices cannot be used; `compare` reports them
    weights = oracle_weights(spec, dtype, source)
    outputs, logits = reference.forward(spec, weights, ids, routing, rounding, dtype=dtype)
    return {**outputs, LOGITS: logits}


def is_choice(chosen: NDArray[Any], layer: LayerSpec) -> bool:
    """Return whether each row has `top_k` different experts in ascending order."""
    if chosen.shape[1] != layer.top_k:
        return False
    ascending = bool((np.diff(chosen, axis=1) > 0).all())
    return ascending and bool(((chosen >= 0) & (chosen < layer.experts)).all())


def oracle_weights(
    spec: ModelSpec, dtype: np.dtype[Any], source: WeightSource
) -> Callable[[str], NDArray[np.float64]]:
    """Return a function from a global name to the rounded weight as float64."""
    specs = model_weights(spec)
    return lambda name: full_weight(source, specs[name], dtype)
