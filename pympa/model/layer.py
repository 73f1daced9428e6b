"""One layer of a rank's stage: its description, its weights, and the resources to compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pympa.kernels import MlpWeights, PackedWeight
from pympa.model.resources import RankResources
from pympa.model.shards import Shards
from pympa.plan.layout import Layout
from pympa.runtime.arena import Array
from pympa.spec import LayerSpec, ModelSpec

Probe = Callable[[str, Array, Layout], None]
"""A function that gets an output: its name, rows `[rows, width]` and their layout."""


class Layer:
    """One layer of a rank's stage.

    Args:
        model: the description of the model.
        index: the number of the layer in the model.
        weights: the weights of this rank.
        resources: the kernels, transports and memory of this rank.
        dtype: the dtype of weights and activations.

    Attributes:
        spec: the description of the layer.
        name: the prefix of the layer's weights and outputs.
    """

    def __init__(
        self,
        model: ModelSpec,
        index: int,
        weights: Shards,
        resources: RankResources,
        dtype: np.dtype[Any],
    ) -> None:
        self.model = model
        self.index = index
        self.spec = model.blocks[index]
        self.name = f"layers.{index}"
        self.weights = weights
        self.resources = resources
        self.kernels = resources.kernels
        self.arena = resources.arena
        self.dtype = dtype

    def before(self, branch: str, rows: Array) -> Array:
        """Return the input of a branch, "attention" or "mlp": rows after its norm, if it has one.

        Without a norm before the branch these are the given rows `[rows, d_model]` themselves.
        """
        return self._normed(f"{branch}_norm", rows)

    def after(self, branch: str, rows: Array) -> Array:
        """Return the output of a branch `[rows, d_model]` as it is added to the stream."""
        return self._normed(f"{branch}_post_norm", rows)

    def has_post_norm(self, branch: str) -> bool:
        """Return whether the output of a branch has a norm."""
        return f"{branch}_post_norm" in self.spec.norms

    def _normed(self, name: str, rows: Array) -> Array:
        if name not in self.spec.norms:
            return rows
        return normed(self.resources, self.weights, f"{self.name}.{name}", self.spec, rows)

    def matrix(self, name: str) -> PackedWeight:
        """Return one of the layer's packed weights."""
        return self.weights.matrices[f"{self.name}.{name}"]

    def vector(self, name: str) -> Array | None:
        """Return one of the layer's norms or biases, or None."""
        return self.weights.vectors.get(f"{self.name}.{name}")

    def mlp(self, prefix: str) -> MlpWeights:
        """Return the weights of the layer's MLP, experts or shared experts."""
        return MlpWeights(
            self.matrix(f"{prefix}.up"),
            self.matrix(f"{prefix}.down"),
            self.spec.activation,
            up_bias=self.vector(f"{prefix}.up_bias"),
            gate=self.matrix(f"{prefix}.gate") if self.spec.gated else None,
            gate_bias=self.vector(f"{prefix}.gate_bias"),
            limit=self.spec.swiglu_limit,
            alpha=self.spec.swiglu_alpha,
        )

    def chunks(self, rows: int) -> Iterator[slice]:
        """Cut rows so that temporary arrays stay small; yield the chunks to run."""
        step = self.kernels.row_chunk
        whole = rows // step * step
        loops = self.resources.loops
        yield from loops.chunks([slice(a, a + step) for a in range(0, whole, step)])
        if whole < rows:
            yield slice(whole, rows)

    def probed(
        self, probe: Probe | None, output: str, layout: Layout, here: slice | None = None
    ) -> Callable[[Array], None] | None:
        """Return a function that passes an output of the layer to the probe; None without a probe.

        Args:
            probe: a function that gets outputs, or None.
            output: the name of the output in the layer.
            layout: the layout of the rows of the layer.
            here: the rows of the output; None means all.
        """
        if probe is None:
            return None
        rows = layout if here is None else layout.slice(here.start, here.stop)
        return lambda array: probe(f"{self.name}.{output}", array, rows)


def normed(
    resources: RankResources, weights: Shards, name: str, spec: LayerSpec, rows: Array
) -> Array:
    """Return rows `[rows, d_model]` after a norm, in memory of the arena.

    Args:
        resources: the kernels and memory of this rank.
        weights: the weights of this rank, with the norm.
        name: the name of the norm.
        spec: the description of the layer, with the kind of norm.
        rows: the rows `[rows, d_model]`.
    """
    out = resources.arena.empty(rows.shape, rows.dtype)
    weight, bias = weights.vectors[f"{name}.weight"], weights.vectors.get(f"{name}.bias")
    offset = float(spec.norm_offset)
    kernels = resources.kernels
    kernels.norm(rows, weight, bias, out, eps=spec.norm_eps, kind=spec.norm, offset=offset)
    return out
