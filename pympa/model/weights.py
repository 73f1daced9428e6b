"""The weights of a model: their names, their global shapes, and the source of their elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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
        float32: whether it is float32 whatever the dtype of the others.
    """

    name: str
    shape: tuple[int, ...]
    float32: bool = False

    def dtype(self, others: np.dtype[Any]) -> np.dtype[Any]:
        """Return the dtype of this tensor in a model with the dtype `others`."""
        return np.dtype(np.float32) if self.float32 else others


class WeightSource(Protocol):
    """Gives any part of any tensor of a model: random numbers, or files.

    The elements depend on the tensor's name and on global indices only, so every plan on every
    backend gets the same weights.
    """

    @property
    def identity(self) -> str:
        """The text that identifies these weights; it is part of the digest of a job."""

    def read(
        self,
        spec: WeightSpec,
        out: NDArray[Any],
        rows: Sequence[Bounds] | None = None,
        cols: Sequence[Bounds] | None = None,
    ) -> NDArray[Any]:
        """Return the elements [rows, cols] of a tensor; None means all.

        Args:
            spec: the tensor.
            out: an array `[rows, cols]` (or `[rows]`) of the dtype, to fill if the elements do not
                lie in memory as they are wanted; they are rounded to nearest even.
            rows: the spans of the first axis, one after the other.
            cols: the spans of the second axis, in ascending order.

        Returns:
            `out`, filled; or a read-only array of its shape and dtype, the elements of a row side
            by side, which is valid until the next call.
        """


def fill_weight(
    source: WeightSource,
    spec: WeightSpec,
    out: NDArray[Any],
    rows: Sequence[Bounds] | None = None,
    cols: Sequence[Bounds] | None = None,
) -> None:
    """Fill `out` with elements of a tensor; see `WeightSource.read`."""
    found = source.read(spec, out, rows, cols)
    if found is not out:
        out[...] = found


def full_weight(
    source: WeightSource, spec: WeightSpec, dtype: np.dtype[Any]
) -> NDArray[np.float64]:
    """Return a whole tensor, rounded to its dtype in a model of `dtype`, as float64."""
    out = np.empty(spec.shape, spec.dtype(dtype))
    fill_weight(source, spec, out)
    return out.astype(np.float64)


def model_weights(spec: ModelSpec) -> dict[str, WeightSpec]:
    """Return every tensor of a model by name; a linear weight is `[outputs, inputs]`."""
    return dict(_model_weights(spec))


@lru_cache(maxsize=2)
def _model_weights(spec: ModelSpec) -> dict[str, WeightSpec]:
    """Return the tensors; the ranks of a process that are run on shapes share them."""
    found: dict[str, WeightSpec] = {}
    add = _Adder(found, "", spec.d_model)
    add.tensor("embedding", spec.vocabulary, spec.d_model)
    for index, layer in enumerate(spec.blocks):
        of_layer = _Adder(found, f"layers.{index}.", spec.d_model)
        for name in layer.norms:
            of_layer.norm(name, layer.norm)
        _add_attention(of_layer, layer)
        if layer.experts:
            _add_experts(of_layer, layer)
        else:
            of_layer.mlp("mlp.", layer)
    add.norm("final_norm", spec.blocks[-1].norm)
    if not spec.tied_head:
        add.matrix("head", spec.vocabulary)
    return found


@dataclass(frozen=True)
class _Adder:
    """Adds tensors with a prefix to those found."""

    found: dict[str, WeightSpec]
    prefix: str
    d_model: int

    def tensor(self, name: str, *shape: int, float32: bool = False) -> None:
        """Add a tensor."""
        self.found[self.prefix + name] = WeightSpec(self.prefix + name, shape, float32)

    def matrix(
        self, name: str, outputs: int, inputs: int | None = None, bias: bool = False
    ) -> None:
        """Add a linear weight; its inputs are d_model by default."""
        self.tensor(name, outputs, inputs or self.d_model)
        if bias:
            self.tensor(name + "_bias", outputs)

    def norm(self, name: str, kind: NormKind) -> None:
        """Add a norm of d_model values."""
        self.tensor(name + ".weight", self.d_model)
        if kind == "layer":
            self.tensor(name + ".bias", self.d_model)

    def mlp(self, at: str, layer: LayerSpec, hidden: int | None = None) -> None:
        """Add an MLP; its hidden width is that of the layer's by default."""
        hidden = hidden or layer.mlp_hidden
        for name in ("gate", "up") if layer.gated else ("up",):
            self.matrix(at + name, hidden, bias=layer.mlp_bias)
        self.matrix(at + "down", self.d_model, hidden, bias=layer.mlp_bias)


def _add_attention(add: _Adder, layer: LayerSpec) -> None:
    bias, latent = layer.attention_bias, layer.latent
    k_dim, inputs, q_inputs = layer.head_dim, None, None
    if latent is not None:
        q_inputs, inputs = latent.q_rank, latent.kv_rank
        k_dim = layer.head_dim - layer.rotated_dim
        for name, rank in (("q_latent", latent.q_rank), ("kv_latent", latent.kv_rank)):
            if rank is not None:
                add.matrix(f"attention.{name}", rank)
                add.tensor(f"attention.{name}_norm", rank)
        add.matrix("attention.k_rotated", layer.rotated_dim)
    add.matrix("attention.q", layer.heads * layer.head_dim, q_inputs, bias)
    add.matrix("attention.k", layer.n_kv_heads * k_dim, inputs, bias)
    add.matrix("attention.v", layer.n_kv_heads * layer.value_dim, inputs, bias)
    add.matrix("attention.out", add.d_model, layer.heads * layer.value_dim, bias=layer.has_out_bias)
    if layer.qk_norm != "none":
        q_heads, k_heads = (layer.heads, layer.n_kv_heads) if layer.qk_norm == "all" else (1, 1)
        add.tensor("attention.q_norm", q_heads * layer.head_dim)
        add.tensor("attention.k_norm", k_heads * layer.head_dim)
    if layer.sinks:
        add.tensor("attention.sinks", layer.heads)


def _add_experts(add: _Adder, layer: LayerSpec) -> None:
    add.matrix("router", layer.experts, bias=layer.has_router_bias)
    if layer.routing.choice_bias:
        add.tensor("choice_bias", layer.experts, float32=True)
    for expert in range(layer.experts):
        add.mlp(f"experts.{expert}.", layer)
    if layer.shared_experts:
        add.mlp("shared.", layer, layer.shared_width)
    if layer.shared_gate:
        add.matrix("shared_gate", 1)
