"""The weights of one rank: its parts of tensors, loaded, packed and kept."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from pympa.kernels import PackedWeight, rows_at_once
from pympa.model.resources import RankResources
from pympa.model.weights import WeightSource, WeightSpec, fill_weight, model_weights
from pympa.plan.layout import Bounds, part_of, split
from pympa.plan.partition import Stages, stage_bounds
from pympa.plan.shares import (
    HeadSlices,
    LocalHeads,
    Shard,
    attention_shard,
    local_heads,
    mlp_shard,
    slice_heads,
    width,
)
from pympa.runtime.arena import Array
from pympa.spec import LayerSpec, ModelSpec

Part = list[Bounds] | None
_SCALED_ROWS = 64  # rows that are float64 at once


class Shards:
    """This rank's weights, by their global names.

    This rank's experts of a layer form one weight, `layers.0.experts.up` and so on.

    Args:
        spec: the model.
        resources: the kernels and memory of this rank.
        dtype: the dtype of all weights.
        source: the source of the elements.
        stages: the layers of each stage; None means `stage_bounds` at its default context.

    Attributes:
        layers: the bounds (start, stop) of this stage's layers.
        vocabulary: the bounds (start, stop) of this rank's rows of the embedding and the head.
        heads: the heads of this rank, by layer.
        slices: the slice of each head of this rank, by layer.
        vectors: the norms, biases and the embedding, by name.
        matrices: the packed linear weights, by name.
    """

    def __init__(
        self,
        spec: ModelSpec,
        resources: RankResources,
        dtype: np.dtype[Any],
        source: WeightSource,
        stages: Stages | None = None,
    ) -> None:
        mesh = resources.mesh
        plan, stage = mesh.plan, mesh.coordinate("pp")
        self._specs = model_weights(spec)
        self._resources, self._dtype, self._source = resources, dtype, source
        self.layers = (stages or stage_bounds(spec, plan, itemsize=dtype.itemsize))[stage]
        self.vocabulary = self._columns(spec.vocabulary, "columns")
        self.heads: dict[int, LocalHeads] = {}
        self.slices: dict[int, HeadSlices] = {}
        self.vectors: dict[str, Array] = {}
        self.matrices: dict[str, PackedWeight] = {}
        if stage == 0:
            self._keep("embedding", [self.vocabulary], scale=spec.embedding_scale)
        names: defaultdict[str, list[str]] = defaultdict(list)
        for name in self._specs:
            names[".".join(name.split(".")[:2])].append(name)
        blocks = spec.blocks
        for index in range(*self.layers):
            with resources.arena.part(f"layers.{index}"):
                self._load_layer(index, blocks[index], names[f"layers.{index}"])
        if stage == plan.pp - 1:
            for name in [n for n in self._specs if n.startswith("final_norm")]:
                self._keep(name, None)
            table = "embedding" if spec.tied_head else "head"
            self.matrices["head"] = self._pack(table, [self.vocabulary], None)
        resources.arena.end_loading()
        del self._source  # and with it memory maps, or arrays that were moved to the host

    @property
    def elements(self) -> int:
        """The number of elements of all weights on this rank, without padding of packed weights."""
        vectors = sum(vector.size for vector in self.vectors.values())
        groups = ((math.prod(m.data.shape[:-1]), m) for m in self.matrices.values())
        return vectors + sum(count * matrix.n * matrix.k for count, matrix in groups)

    def _load_layer(self, index: int, layer: LayerSpec, names: Sequence[str]) -> None:
        mesh, prefix = self._resources.mesh, f"layers.{index}."
        self.heads[index] = local_heads(layer, mesh.plan.tp, mesh.coordinate("tp"))
        self.slices[index] = slice_heads(layer, mesh.plan.dim, mesh.coordinate("dim"))
        for name in names:
            local = name.removeprefix(prefix)
            if not local.startswith("experts."):
                self._load(name, self._shard(local, index, layer))
        if layer.experts:
            self._load_experts(f"{prefix}experts.", layer, names)

    def _shard(self, name: str, index: int, layer: LayerSpec) -> Shard:
        """Return the part of a block's weight that this rank holds."""
        kind = name.partition(".")[0]
        if kind == "attention":
            return attention_shard(name, layer, self.heads[index], self.slices[index])
        if kind == "mlp":
            return mlp_shard(name, self._columns(layer.mlp_hidden, "columns"))
        if kind == "shared":
            return mlp_shard(name, self._columns(layer.shared_width, "etp"))
        return None, None

    def _columns(self, width: int, axis: str) -> tuple[int, int]:
        mesh = self._resources.mesh
        return split(width, mesh.plan.degree(axis))[mesh.coordinate(axis)]

    def _load(self, name: str, parts: Shard) -> None:
        if len(self._specs[name].shape) == 1:
            self._keep(name, parts[0])
        else:
            self.matrices[name] = self._pack(name, *parts)

    def _load_experts(self, prefix: str, layer: LayerSpec, names: Sequence[str]) -> None:
        """Load this rank's experts: whole ones over `ep`, columns of them over `etp`."""
        arena, columns = self._resources.arena, self._columns(layer.mlp_hidden, "etp")
        mine = range(*self._columns(layer.experts, "ep"))
        first = f"{prefix}0."
        for kind in [n.removeprefix(first) for n in names if n.startswith(first)]:
            rows, cols = mlp_shard(kind, columns)
            specs = [self._specs[f"{prefix}{expert}.{kind}"] for expert in mine]
            shape = _shape(specs[0].shape, rows, cols)
            if len(shape) == 2:
                self.matrices[prefix + kind] = self._pack_group(specs, rows, cols)
                continue
            biases = arena.empty((len(mine), *shape), self._dtype, "weights")
            for spec, bias in zip(specs, biases, strict=True):
                self._resources.kernels.fill(bias, partial(self._fill, spec, rows))
            self.vectors[prefix + kind] = biases

    def _keep(self, name: str, rows: Part, scale: float = 1.0) -> None:
        spec = self._specs[name]
        shape, dtype = _shape(spec.shape, rows, None), spec.dtype(self._dtype)
        out = self._resources.arena.empty(shape, dtype, "weights")
        step = rows_at_once(spec.shape, dtype)
        for first in range(0, len(out), step):
            piece = out[first : first + step]
            part = _piece(spec, rows, first, first + len(piece))
            self._resources.kernels.fill(piece, partial(self._fill, spec, part, scale=scale))
        self.vectors[name] = out

    def _fill(self, spec: WeightSpec, rows: Part, out: Array, scale: float = 1.0) -> None:
        fill_weight(self._source, spec, out, rows)
        if scale != 1.0:
            _multiply(out, float(np.asarray(scale).astype(out.dtype)))

    def _pack(self, name: str, rows: Part, cols: Part) -> PackedWeight:
        spec = self._specs[name]
        n, k = _shape(spec.shape, rows, cols)
        read = partial(self._read, spec, rows, cols)
        return self._resources.kernels.pack((n, k), self._dtype, read)

    def _pack_group(self, specs: Sequence[WeightSpec], rows: Part, cols: Part) -> PackedWeight:
        """Return the same part of each weight, packed as a group."""
        n, k = _shape(specs[0].shape, rows, cols)

        def read(number: int, *piece: Any) -> Array:
            return self._read(specs[number], rows, cols, *piece)

        return self._resources.kernels.pack_group(len(specs), (n, k), self._dtype, read)

    def _read(
        self, spec: WeightSpec, rows: Part, cols: Part, first: int, last: int, out: Array
    ) -> Array:
        """Return rows first..last of a part of a weight; see `WeightSource.read`."""
        return self._source.read(spec, out, _piece(spec, rows, first, last), cols)


def _multiply(rows: Array, scale: float) -> None:
    """Multiply rows in place, each element rounded once."""
    for at in range(0, len(rows), _SCALED_ROWS):
        part = rows[at : at + _SCALED_ROWS]
        part[:] = part.astype(np.float64) * scale


def _piece(spec: WeightSpec, rows: Part, first: int, last: int) -> list[Bounds]:
    """Return rows first..last of a part of a tensor."""
    return part_of([(0, spec.shape[0])] if rows is None else rows, first, last)


def _shape(whole: tuple[int, ...], rows: Part, cols: Part) -> tuple[int, ...]:
    """Return the shape of a part of a matrix or, without columns, of a vector."""
    parts = zip(whole, (rows, cols), strict=False)
    return tuple(size if part is None else width(part) for size, part in parts)
