"""The weights of a model: their names, their global shapes, and the source of their elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pympa.plan.layout import Bounds
from pympa.spec import LayerSpec, ModelSpec, NormKind


@dataclass(frozen=True)
class WeightSpec:
    """A tensor of the model before any splitting.

    Attributes:
        name: the global name, as in `layers.0.attention.q`.
        shape: the global shape, `[n]` or `[outputs, inputs]`.
    """

    name: str
    shape: tuple[int, ...]


class WeightSource(Protocol):
    """Fills any part of any tensor of a model: random numbers, or files.

    The elements depend on the tensor's name and on global indices only, so every plan on every
    backend gets the same weights.
    """

    @property
    def identity(self) -> str:
        """The text that identifies these weights; it is part of the digest of a job."""

    def fill(
        self,
        spec: WeightSpec,
        out: NDArray[Any],
        rows: Sequence[Bounds] | None = None,
        cols: Sequence[Bounds] | None = None,
    ) -> None:
        """Fill `out` with the elements [rows, cols] of a tensor; None means all.

        Args:
            spec: the tensor.
            out: an array `[rows, cols]` (or `[rows]`) of the dtype; rounded to nearest even.
            rows: the spans of the first axis, one after the other.
            cols: the spans of the second axis, in ascending order.
        """


def full_weight(
    source: WeightSource, spec: WeightSpec, dtype: np.dtype[Any]
) -> NDArray[np.float64]:
    """Return a whole tensor, rounded to `dtype`, as float64, for the oracle."""
    out = np.empty(spec.shape, dtype)
    source.fill(spec, out)
    return out.astype(np.float64)


def model_weights(spec: ModelSpec) -> dict[str, WeightSpec]:
    """Return every tensor of a model by name; a linear weight is `[outputs, inputs]`."""
    found: dict[str, WeightSpec] = {}
    d_model = spec.d_model

    def add(name: str, *shape: int) -> None:
        found[name] = WeightSpec(name, shape)

    def matrix(name: str, outputs: int, inputs: int, bias: bool = False) -> None:
        add(name, outputs, inputs)
        if bias:
            add(name + "_bias", outputs)

    def norm(name: str, kind: NormKind) -> None:
        add(name + ".weight", d_model)
        if kind == "layer":
            add(name + ".bias", d_model)

    def mlp(at: str, layer: LayerSpec, hidden: int) -> None:
        for name in ("gate", "up") if layer.gated else ("up",):
            matrix(at + name, hidden, d_model, layer.mlp_bias)
        matrix(at + "down", d_model, hidden, layer.mlp_bias)

    add("embedding", spec.vocabulary, d_model)
    for index, layer in enumerate(spec.blocks):
        at, bias = f"layers.{index}.", layer.attention_bias
        norm(at + "attention_norm", layer.norm)
        matrix(at + "attention.q", layer.heads * layer.head_dim, d_model, bias)
        matrix(at + "attention.k", layer.n_kv_heads * layer.head_dim, d_model, bias)
        matrix(at + "attention.v", layer.n_kv_heads * layer.value_dim, d_model, bias)
        matrix(at + "attention.out", d_model, layer.heads * layer.value_dim, bias)
        if layer.qk_norm:
            add(at + "attention.q_norm", layer.head_dim)
            add(at + "attention.k_norm", layer.head_dim)
        norm(at + "mlp_norm", layer.norm)
        if not layer.experts:
            mlp(at + "mlp.", layer, layer.mlp_hidden)
            continue
        matrix(at + "router", layer.experts, d_model)
        if layer.router_skew:
            add(at + "router_bias", layer.experts)
        for expert in range(layer.experts):
            mlp(f"{at}experts.{expert}.", layer, layer.mlp_hidden)
        if layer.shared_experts:
            mlp(at + "shared.", layer, layer.shared_experts * layer.mlp_hidden)
    norm("final_norm", spec.blocks[-1].norm)
    if not spec.tied_head:
        matrix("head", spec.vocabulary, d_model)
    return found
