"""What the branches of a block have in common: the layer, its weights and the rank's resources."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pympa.arena import Array
from pympa.kernels import MlpWeights, PackedWeight
from pympa.layout import Layout
from pympa.rank import Rank
from pympa.shards import Shards
from pympa.spec import ModelSpec

Probe = Callable[[str, Array, Layout], None]
"""Sees an output by name, rows `[rows, width]` and their layout."""


class Context:
    """One block of a rank's stage.

    Args:
        spec: the model.
        index: of the block in the model.
        weights: this rank's.
        rank: its kernels, transports and memory.
        dtype: of weights and activations.

    Attributes:
        name: prefix of the block's weights and outputs.
        layer: its description.
    """

    def __init__(
        self, spec: ModelSpec, index: int, weights: Shards, rank: Rank, dtype: np.dtype[Any]
    ) -> None:
        self.spec = spec
        self.index = index
        self.layer = spec.blocks[index]
        self.name = f"layers.{index}"
        self.weights = weights
        self.rank = rank
        self.kernels = rank.kernels
        self.arena = rank.arena
        self.dtype = dtype

    def normed(self, name: str, rows: Array) -> Array:
        """Return rows `[rows, d_model]` after one of the block's norms."""
        return self.weights.normed(f"{self.name}.{name}", self.layer, rows)

    def matrix(self, name: str) -> PackedWeight:
        """Return one of the block's packed weights."""
        return self.weights.matrices[f"{self.name}.{name}"]

    def has(self, name: str) -> bool:
        """Tell whether the block has a packed weight of that name."""
        return f"{self.name}.{name}" in self.weights.matrices

    def vector(self, name: str) -> Array | None:
        """Return one of the block's norms or biases, or None."""
        return self.weights.vectors.get(f"{self.name}.{name}")

    def mlp(self, prefix: str) -> MlpWeights:
        """Return the weights of the block's MLP, experts or shared experts."""
        return MlpWeights(
            self.matrix(f"{prefix}.up"),
            self.matrix(f"{prefix}.down"),
            self.layer.activation,
            up_bias=self.vector(f"{prefix}.up_bias"),
            gate=self.matrix(f"{prefix}.gate") if self.has(f"{prefix}.gate") else None,
            gate_bias=self.vector(f"{prefix}.gate_bias"),
        )

    def chunks(self, rows: int) -> Iterator[slice]:
        """Cut rows so that temporary arrays stay small; yield the chunks to go through."""
        step = self.kernels.row_chunk
        whole = rows // step * step
        yield from self.rank.loops.chunks([slice(a, a + step) for a in range(0, whole, step)])
        if whole < rows:
            yield slice(whole, rows)
