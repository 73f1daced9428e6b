"""A transformer assembled from a (ModelSpec, Plan): the forward pass of one rank.

`prepare` lays a batch out once; `forward` is then one step and allocates nothing new.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Array
from pympa.batch import Batch, MicroBatch, lay_out_batch
from pympa.block import Attention, Context, Probe, feed_forward
from pympa.kv_cache import KeysAtHand, KvCache
from pympa.parallel.capacity import Capacity
from pympa.parallel.stages import stream_micro_batches
from pympa.parallel.tensor import reduce_partials
from pympa.partition import Bounds
from pympa.rank import Rank
from pympa.shards import Shards
from pympa.spec import LayerSpec, ModelSpec, Rope
from pympa.weights import PhiloxSource

_ANGLES = 4096  # positions whose sines are computed at once


@dataclass(frozen=True)
class Logits:
    """Scores of the next token after the sequences whose last token this rank holds.

    Attributes:
        sequences: which sequences. vocabulary: (start, stop) of the rank's share.
        values: float32 `[sequences, share]`.
    """

    sequences: tuple[int, ...]
    vocabulary: tuple[int, int]
    values: Array


@dataclass(frozen=True)
class Prepared:
    """What a step needs besides the weights, made once for each batch.

    Attributes:
        batch: this rank's layouts and token ids.
        rope: cos and sin, float32 `[positions, half]`, for each rotary embedding.
        logits: where the results of each micro-batch go; empty but on the last stage.
    """

    batch: Batch
    rope: Mapping[tuple[Rope, int], tuple[Array, Array]]
    logits: tuple[Logits, ...]


class Model:
    """One rank's part of a transformer.

    Args:
        spec: the model.
        rank: its place, kernels, transports and memory; the model lives as long as the scope of
            the arena that it is made in.
        dtype: of weights and activations.
        source: where weights come from.
        stages: layers of each stage, the same on all ranks; None means `stage_bounds` at its
            default context.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rank: Rank,
        dtype: np.dtype[Any],
        source: PhiloxSource | None = None,
        *,
        stages: Bounds | None = None,
    ) -> None:
        self.spec = spec
        self.mesh = rank.mesh
        self.dtype = dtype
        self._rank = rank
        self._kernels, self._arena = rank.kernels, rank.arena
        self._tp = rank.transports["tp"]
        self._weights = Shards(spec, rank, dtype, source or PhiloxSource(), stages)
        contexts = {
            index: Context(spec, index, self._weights, rank, dtype)
            for index in range(*self._weights.layers)
        }
        self._attention = {index: Attention(context) for index, context in contexts.items()}
        self._feed_forward = {index: feed_forward(context) for index, context in contexts.items()}
        self._alike = [
            list(run) for _, run in itertools.groupby(self.layers, lambda index: spec.blocks[index])
        ]
        self._is_first = self.mesh.coordinate("pp") == 0
        self._is_last = self.mesh.coordinate("pp") == self.mesh.plan.pp - 1

    @property
    def layers(self) -> range:
        """Those on this rank's stage."""
        return range(*self._weights.layers)

    @property
    def parameters(self) -> int:
        """Elements of all weights on this rank, norms and biases included."""
        return self._weights.elements

    def prepare(
        self, ids: Sequence[NDArray[np.int32]], micro_batches: int | None = None
    ) -> Prepared:
        """Lay out a batch of sequences of token ids over the mesh, as this rank sees it.

        Args:
            ids: token ids of every sequence, int32.
            micro_batches: parts in time; None means the plan's.
        """
        batch = lay_out_batch(
            self.mesh,
            ids,
            micro_batches or self.mesh.plan.micro_batches,
            dry=self._arena.dry,
        )
        tables: dict[tuple[Rope, int], tuple[Array, Array]] = {}
        for layer in self.spec.blocks:
            kind = (layer.rope, layer.rotated_dim)
            if layer.rope is not None and kind not in tables:
                tables[layer.rope, layer.rotated_dim] = self._rope_table(layer, batch.positions)
        share = self._weights.vocabulary
        logits = tuple(
            Logits(
                part.last_sequences,
                share,
                self._arena.empty((len(part.last_rows), share[1] - share[0]), np.float32),
            )
            for part in batch.micro_batches
        )
        return Prepared(batch, tables, logits if self._is_last else ())

    def forward(self, prepared: Prepared, probe: Probe | None = None) -> tuple[Logits, ...]:
        """Run one step. Collective.

        Args:
            prepared: from `prepare`; its logits are overwritten.
            probe: sees every branch before the residual, and the last residual stream.

        Returns:
            Logits of the last tokens that this rank holds; nothing but on the last stage.
        """
        batch = prepared.batch
        self._rank.loops.restart()
        with self._rank.trace.step(), self._arena.scope():
            parts, loops = batch.micro_batches, self._rank.loops
            rows = [part.layout.rows for part in parts]
            kept: dict[int, KvCache] = {}
            at_hand = KeysAtHand()
            for index, attend in self._attention.items():
                with self._arena.part(f"layers.{index}"):
                    if batch.keeps_kv:
                        kept[index] = attend.cache(parts, at_hand)
            turns = [part.layouts for part in parts]
            capacities = {
                index: Capacity(self.spec.blocks[index], turns, batch.lengths)
                for index in self._feed_forward
            }

            def compute(number: int, x: Array) -> None:
                part = parts[number]
                if self._is_first:
                    self._embed(part, x)
                for alike in self._alike:
                    for index in loops.layers(alike):
                        self._block(
                            index, x, part, prepared, kept.get(index), capacities[index], probe
                        )
                if self._is_last:
                    if probe is not None:
                        probe("output", x, part.layout)
                    self._head(x, part, prepared.logits[number].values)

            def micro_batch(number: int, x: Array) -> None:
                at_hand.take(parts[number])
                loops.micro_batch(parts[number].kind, lambda: compute(number, x))

            stream_micro_batches(
                self._rank.transports["pp"], rows, self.spec.d_model, self.dtype, micro_batch
            )
            self._rank.transports["ring"].settle()
        return prepared.logits

    def read(self, array: Array) -> NDArray[Any]:
        """Return a copy on the host of an array that a probe sees, or of logits."""
        return self._kernels.read(array)

    def _block(
        self,
        index: int,
        x: Array,
        part: MicroBatch,
        prepared: Prepared,
        kept: KvCache | None,
        capacity: Capacity,
        probe: Probe | None,
    ) -> None:
        """Run one layer: x [rows, d] + attention + MLP or experts."""
        layer, attend = self.spec.blocks[index], self._attention[index]
        rope = prepared.rope[layer.rope, layer.rotated_dim] if layer.rope else None
        with self._arena.part(f"layers.{index}"):
            with self._arena.scope():
                attend(x, part, rope, kept or attend.cache([part], KeysAtHand(part)), probe)
            self._feed_forward[index](x, part, capacity, probe)

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

    def _head(self, x: Array, part: MicroBatch, out: Array) -> None:
        """Compute the logits of the rows that end a sequence."""
        with self._arena.scope():
            rows = self._arena.empty((len(part.last_rows), self.spec.d_model), self.dtype)
            self._kernels.gather_rows(x, part.last_rows, rows)
            normed = self._weights.normed("final_norm", self.spec.blocks[-1], rows)
            self._kernels.linear(normed, self._weights.matrices["head"], out)

    def _rope_table(self, layer: LayerSpec, positions: NDArray[np.int64]) -> tuple[Array, Array]:
        half = layer.rotated_dim // 2
        cos = self._arena.empty((len(positions), half), np.float32)
        sin = self._arena.empty((len(positions), half), np.float32)
        rope = layer.rope
        if rope is not None:
            frequency = rope.theta ** (-np.arange(half) / half)

            def write(out: Array, function: np.ufunc) -> None:
                for at in range(0, len(positions), _ANGLES):  # in float64, whatever the batch
                    here = slice(at, at + _ANGLES)
                    scaled = positions[here] / rope.scaling_factor
                    out[here] = function(scaled[:, None] * frequency)

            self._kernels.fill(cos, partial(write, function=np.cos))
            self._kernels.fill(sin, partial(write, function=np.sin))
        return cos, sin
