"""A transformer assembled from a (ModelSpec, Plan): the forward pass of one rank.

`prepare` splits a batch once; `forward` is then one step and allocates nothing new.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.model.batch import Batch, MicroBatch, lay_out_batch
from pympa.model.block import Block, BlockStep
from pympa.model.kv_cache import VisibleKeys, kept_rows
from pympa.model.layer import Layer, Probe, normed
from pympa.model.projections import RopeTable
from pympa.model.random_weights import random_weights
from pympa.model.resources import RankResources
from pympa.model.rope import fill_table
from pympa.model.shards import Shards
from pympa.model.weights import WeightSource
from pympa.parallel.stages import stream_micro_batches
from pympa.parallel.tensor import reduce_partials
from pympa.plan.layout import Layout
from pympa.plan.partition import Stages
from pympa.runtime.arena import Array
from pympa.spec import LayerSpec, ModelSpec, Rope

RopeKind = tuple[Rope | None, int]
"""A rotary embedding and the number of dimensions that it rotates."""


@dataclass(frozen=True)
class Logits:
    """The scores of the next token, after the last tokens of sequences or after all tokens.

    Attributes:
        rows: the rows of the micro-batch, int32; None means all.
        layout: the positions of these tokens.
        vocabulary: the bounds (start, stop) of the rank's share of the vocabulary.
        values: the scores, float32 `[rows, share]`.
    """

    rows: NDArray[np.int32] | None
    layout: Layout
    vocabulary: tuple[int, int]
    values: Array


@dataclass(frozen=True)
class Prepared:
    """The data of a step besides the weights, made once for each batch.

    Attributes:
        batch: the layouts and token ids of this rank.
        rope: the tables of cos and sin, float32 `[positions, half]`, for each rotary embedding.
        logits: the arrays for the results of each micro-batch; empty except on the last stage.
    """

    batch: Batch
    rope: Mapping[RopeKind, RopeTable]
    logits: tuple[Logits, ...]


class Model:
    """One rank's part of a transformer.

    Args:
        spec: the model.
        resources: the kernels, transports and memory of this rank. The model must not outlive the
            scope of the arena in which it is made.
        dtype: the dtype of weights and activations.
        source: the source of the weights; None means random weights.
        stages: the layers of each stage, the same on all ranks; None means `stage_bounds` at its
            default context.

    Attributes:
        alike: the numbers of this rank's layers, with equal layers in a row together.
    """

    def __init__(
        self,
        spec: ModelSpec,
        resources: RankResources,
        dtype: np.dtype[Any],
        source: WeightSource | None = None,
        *,
        stages: Stages | None = None,
    ) -> None:
        self.spec = spec
        self.mesh = resources.mesh
        self.dtype = dtype
        self._resources = resources
        self._kernels, self._arena = resources.kernels, resources.arena
        self._tp = resources.transports["tp"]
        self._weights = Shards(spec, resources, dtype, source or random_weights(spec), stages)
        blocks = spec.blocks
        self._blocks = {
            index: Block(Layer(spec, index, self._weights, resources, dtype))
            for index in self.layers
        }
        self.alike = [
            list(run) for _, run in itertools.groupby(self.layers, lambda index: blocks[index])
        ]
        self._is_first = self.mesh.coordinate("pp") == 0
        self._is_last = self.mesh.coordinate("pp") == self.mesh.plan.pp - 1

    @property
    def layers(self) -> range:
        """The numbers of the layers on this rank's stage."""
        return range(*self._weights.layers)

    @property
    def parameters(self) -> int:
        """The number of elements of all weights on this rank, including norms and biases."""
        return self._weights.elements

    def kv_bytes(self, lengths: Sequence[int]) -> int:
        """Return the bytes of the keys and values of all layers of this rank for whole sequences.

        Of a layer with a window only the keys count that a next token sees.
        """
        blocks = self.spec.blocks
        rows = {
            window: kept_rows(self.mesh, lengths, window)
            for window in {layer.window for layer in self.spec.layers}
        }
        return sum(
            rows[blocks[index].window] * block.kv_row_bytes for index, block in self._blocks.items()
        )

    def prepare(
        self,
        ids: Sequence[NDArray[np.int32]],
        micro_batches: int | None = None,
        *,
        all_logits: bool = False,
    ) -> Prepared:
        """Split a batch of sequences of token ids over the mesh, for this rank.

        Args:
            ids: the token ids of every sequence, int32.
            micro_batches: the number of micro-batches; None means the plan's.
            all_logits: whether logits of all tokens are computed, instead of the last ones.
        """
        batch = lay_out_batch(
            self.mesh,
            ids,
            micro_batches or self.mesh.plan.micro_batches,
            dry=self._arena.dry,
        )
        spec = self.spec.within(max(batch.lengths, default=1))
        tables: dict[RopeKind, RopeTable] = {}
        for layer in spec.layers:
            kind = _rope_kind(layer)
            if layer.rope is not None and kind not in tables:
                width, context = layer.rotated_dim, spec.context
                tables[kind] = self._rope_table(layer.rope, width, context, batch.positions)
        logits: tuple[Logits, ...] = ()
        if self._is_last:
            parts = batch.micro_batches
            logits = tuple(self._empty_logits(part, all_logits=all_logits) for part in parts)
        return Prepared(batch, tables, logits)

    def _empty_logits(self, part: MicroBatch, *, all_logits: bool) -> Logits:
        """Return the arrays for the logits of a micro-batch."""
        share = self._weights.vocabulary
        rows, layout = (None, part.layout) if all_logits else (part.last_rows, part.last_layout)
        values = self._arena.empty((layout.rows, share[1] - share[0]), np.float32)
        return Logits(rows, layout, share, values)

    def forward(self, prepared: Prepared, probe: Probe | None = None) -> tuple[Logits, ...]:
        """Run one step. Collective.

        Args:
            prepared: the data from `prepare`; its logits are overwritten.
            probe: a function that gets every branch before the residual, and the last residual
                stream; or None.

        Returns:
            The logits of the last tokens that this rank has; empty except on the last stage.
        """
        batch, parts = prepared.batch, prepared.batch.micro_batches
        rows = [part.layout.rows for part in parts]
        stages, loops = self._resources.transports["pp"], self._resources.loops
        loops.restart()
        with self._resources.trace.step(), self._arena.scope():
            visible = VisibleKeys()
            kept = {
                index: block.start_step(parts, visible, batch.lengths, keeps_kv=batch.keeps_kv)
                for index, block in self._blocks.items()
            }
            stream = stream_micro_batches(stages, rows, self.spec.d_model, self.dtype)
            for number, x in stream:
                visible.advance(parts[number])
                with loops.micro_batch(parts[number].kind) as runs:
                    if runs:
                        self._compute(number, x, prepared, kept, probe)
            self._resources.transports["ring"].wait_for_readers()
        return prepared.logits

    def read(self, array: Array) -> NDArray[Any]:
        """Return a copy on the host of an array that a probe gets, or of logits."""
        return self._kernels.read(array)

    def _compute(
        self,
        number: int,
        x: Array,
        prepared: Prepared,
        kept: Mapping[int, BlockStep],
        probe: Probe | None,
    ) -> None:
        """Replace the stage's input for a micro-batch by its output: x [rows, d], in place."""
        part = prepared.batch.micro_batches[number]
        blocks = self.spec.blocks
        if self._is_first:
            self._embed(part, x)
        for alike in self.alike:
            for index in self._resources.loops.layers(alike):
                rope = prepared.rope.get(_rope_kind(blocks[index]))
                self._blocks[index](x, part, rope, kept[index], probe)
        if self._is_last:
            if probe is not None:
                probe("output", x, part.layout)
            self._head(x, prepared.logits[number])

    def _embed(self, part: MicroBatch, x: Array) -> None:
        table = self._weights.vectors["embedding"]
        if self._tp.size == 1:
            self._kernels.gather_rows(table, part.ids, x)
            return
        with self._arena.scope():
            partial = self._tp.empty(x.shape, self.dtype)
            first_row = self._weights.vocabulary[0]
            self._kernels.gather_rows(table, part.ids, partial, first_row=first_row)
            reduce_partials(self._kernels, self._tp, partial, None, x)

    def _head(self, x: Array, logits: Logits) -> None:
        """Compute the logits of rows of the stream x [rows, d], some rows at a time."""
        kernels, step = self._kernels, self._kernels.row_chunk
        last, cap = self.spec.blocks[-1], self.spec.logit_softcap
        for at in range(0, logits.layout.rows, step):
            out = logits.values[at : at + step]
            with self._arena.scope():
                rows = x[at : at + step]
                if logits.rows is not None:
                    rows = self._arena.empty((len(out), self.spec.d_model), self.dtype)
                    kernels.gather_rows(x, logits.rows[at : at + step], rows)
                final = normed(self._resources, self._weights, "final_norm", last, rows)
                kernels.linear(final, self._weights.matrices["head"], out)
                if cap is not None:
                    kernels.softcap(out, cap)

    def _rope_table(
        self, rope: Rope, width: int, context: int | None, positions: NDArray[np.int64]
    ) -> RopeTable:
        """Return cos and sin of a rotary embedding of `width` dimensions."""
        cos, sin = (self._arena.empty((len(positions), width // 2), np.float32) for _ in range(2))
        for table, function in ((cos, np.cos), (sin, np.sin)):
            write = partial(
                fill_table,
                function=function,
                positions=positions,
                rope=rope,
                context=context,
            )
            self._kernels.fill(table, write)
        return cos, sin


def _rope_kind(layer: LayerSpec) -> RopeKind:
    """Return the key of the tables of a layer's rotary embedding."""
    return layer.rope, layer.rotated_dim
