"""The weights of one rank: which parts of which tensors, made, packed and kept."""

from __future__ import annotations

from typing import Any

import numpy as np

from pympa.arena import Arena, Array
from pympa.kernels import Kernels, PackedWeight
from pympa.layout import split
from pympa.mesh import Mesh
from pympa.parallel.tensor import HeadShare, head_share, weight_shard
from pympa.spec import LayerSpec, ModelSpec
from pympa.weights import PhiloxSource, model_weights

Part = tuple[int, int] | None


class Shards:
    """This rank's weights, by their global names.

    Args:
        spec: the model.
        mesh: the plan and this rank's place in it.
        kernels: pack the matrices.
        arena: memory.
        dtype: of all weights.
        source: makes the elements.

    Attributes:
        layers: (start, stop) of this stage's layers.
        vocabulary: (start, stop) of this rank's rows of the embedding and the head.
        heads: this rank's share of the heads, by layer.
        vectors: norms, biases and the embedding. matrices: packed linear weights.
    """

    def __init__(
        self,
        spec: ModelSpec,
        mesh: Mesh,
        kernels: Kernels,
        arena: Arena,
        dtype: np.dtype[Any],
        source: PhiloxSource,
    ) -> None:
        tp, tp_index = mesh.plan.tp, mesh.coordinate("tp")
        stage = mesh.coordinate("pp")
        self._specs = model_weights(spec)
        self._kernels, self._arena, self._dtype, self._source = kernels, arena, dtype, source
        self.layers = split(len(spec.blocks), mesh.plan.pp)[stage]
        self.vocabulary = split(spec.vocabulary, tp)[tp_index]
        self.heads: dict[int, HeadShare] = {}
        self.vectors: dict[str, Array] = {}
        self.matrices: dict[str, PackedWeight] = {}
        if stage == 0:
            self._keep("embedding", self.vocabulary)
        for index in range(*self.layers):
            layer, prefix = spec.blocks[index], f"layers.{index}."
            self.heads[index] = head_share(layer, tp, tp_index)
            for name in [n for n in self._specs if n.startswith(prefix)]:
                local = name.removeprefix(prefix)
                parts = weight_shard(local, layer, self.heads[index], tp, tp_index)
                if len(self._specs[name].shape) == 1:
                    self._keep(name, parts[0])
                else:
                    self.matrices[name] = self._pack(name, *parts)
        if stage == mesh.plan.pp - 1:
            for name in [n for n in self._specs if n.startswith("final_norm")]:
                self._keep(name, None)
            table = "embedding" if spec.tied_head else "head"
            self.matrices["head"] = self._pack(table, self.vocabulary, None)

    def normed(self, name: str, layer: LayerSpec, rows: Array) -> Array:
        """Return rows `[rows, d_model]` after the norm called `name`, in memory of the arena."""
        out = self._arena.empty(rows.shape, self._dtype)
        weight, bias = self.vectors[f"{name}.weight"], self.vectors.get(f"{name}.bias")
        self._kernels.norm(rows, weight, bias, out, eps=layer.norm_eps, kind=layer.norm)
        return out

    def _keep(self, name: str, rows: Part) -> None:
        spec = self._specs[name]
        out = self._arena.empty((_size(spec.shape[0], rows), *spec.shape[1:]), self._dtype)
        if not self._arena.dry:
            self._source.fill(spec, out, rows)
        self.vectors[name] = out

    def _pack(self, name: str, rows: Part, cols: Part) -> PackedWeight:
        spec = self._specs[name]
        shape = _size(spec.shape[0], rows), _size(spec.shape[1], cols)
        return self._kernels.pack(
            shape, self._dtype, lambda out: self._source.fill(spec, out, rows, cols)
        )


def _size(whole: int, part: Part) -> int:
    return whole if part is None else part[1] - part[0]
