"""A transformer assembled from a (ModelSpec, Plan): the forward pass of one rank.

The residual stream is `[rows, d_model]`; every block maps a layout to the same layout, so blocks
compose. `prepare` lays a batch out once; `forward` is then one step and allocates nothing new.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Arena, Array
from pympa.batch import Batch, KvCache, MicroBatch, lay_out_batch
from pympa.kernels import AttentionSpec, Kernels, State
from pympa.layout import Layout
from pympa.mesh import Mesh
from pympa.parallel.ring import ring_attention
from pympa.parallel.stages import stream_micro_batches
from pympa.parallel.tensor import add_branch, reduce_partials
from pympa.shards import Shards
from pympa.spec import LayerSpec, ModelSpec, Rope
from pympa.transport import Transport
from pympa.weights import PhiloxSource

ROW_CHUNK = 1024  # rows whose MLP hidden state exists at a time; changes memory, never bits

Probe = Callable[[str, Array, Layout], None]
"""Sees an output by name, rows `[rows, d_model]` and their layout."""


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
        mesh: the plan and this rank's place in it.
        kernels: the backend.
        transports: one for each axis of the mesh.
        arena: memory; the model lives as long as the scope it is made in.
        dtype: of weights and activations.
        source: where weights come from.
        rehearsal: skip all row chunks but the first and the last, which are like the others;
            for measuring memory on a dry arena.
    """

    def __init__(
        self,
        spec: ModelSpec,
        mesh: Mesh,
        kernels: Kernels,
        transports: Mapping[str, Transport],
        arena: Arena,
        dtype: np.dtype[Any],
        source: PhiloxSource,
        *,
        rehearsal: bool = False,
    ) -> None:
        self.spec = spec
        self.mesh = mesh
        self.dtype = dtype
        self._kernels = kernels
        self._transports = transports
        self._tp = transports["tp"]
        self._arena = arena
        self._rehearsal = rehearsal
        self._weights = Shards(spec, mesh, kernels, arena, dtype, source)
        self._is_first = mesh.coordinate("pp") == 0
        self._is_last = mesh.coordinate("pp") == mesh.plan.pp - 1

    def prepare(
        self, ids: Sequence[NDArray[np.int32]], micro_batches: int | None = None
    ) -> Prepared:
        """Lay out a batch of sequences of token ids over the mesh, as this rank sees it.

        Args:
            ids: token ids of every sequence, int32.
            micro_batches: parts in time; None means the plan's.
        """
        batch = lay_out_batch(self.mesh, ids, micro_batches or self.mesh.plan.micro_batches)
        kinds = {(layer.rope, layer.rotated_dim) for layer in self.spec.blocks if layer.rope}
        tables = {
            kind: self._rope_table(*kind, batch.positions) for kind in sorted(kinds, key=repr)
        }
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
        batch, layers = prepared.batch, range(*self._weights.layers)
        with self._arena.scope():
            rows = [part.layout.rows for part in batch.micro_batches]
            kept = {i: self._cache(i, sum(rows)) for i in layers} if batch.keeps_kv else {}

            def compute(index: int, x: Array) -> None:
                part = batch.micro_batches[index]
                if self._is_first:
                    self._embed(part, x)
                for layer in layers:
                    with self._arena.scope():
                        cache = kept[layer] if kept else self._cache(layer, rows[index])
                        self._attention(layer, x, part, prepared, cache, probe)
                    self._mlp(layer, x, part.layout, probe)
                if self._is_last:
                    if probe is not None:
                        probe("output", x, part.layout)
                    self._head(x, part, prepared.logits[index].values)

            stream_micro_batches(
                self._transports["pp"], rows, self.spec.d_model, self.dtype, compute
            )
        return prepared.logits

    def _embed(self, part: MicroBatch, x: Array) -> None:
        table = self._weights.vectors["embedding"]
        if self._tp.size == 1:
            self._kernels.embed(part.ids, table, x)
            return
        with self._arena.scope():
            partial = self._tp.empty(x.shape, self.dtype)
            first_row = self._weights.vocabulary[0]
            self._kernels.embed(part.ids, table, partial, first_row=first_row)
            reduce_partials(self._kernels, self._tp, partial, None, x)

    def _attention(
        self,
        index: int,
        x: Array,
        part: MicroBatch,
        prepared: Prepared,
        cache: KvCache,
        probe: Probe | None,
    ) -> None:
        """Add attention: x [rows, d] -> q, k, v [rows, heads, dim] -> ring -> o -> [rows, d]."""
        layer, share, rows = self.spec.blocks[index], self._weights.heads[index], len(x)
        k, v = cache.append(part)
        q = self._arena.empty((rows, share.heads, layer.head_dim), self.dtype)
        for here in self._chunks(rows):
            with self._arena.scope():
                qkv = (q[here], k[here], v[here])
                self._project(index, x[here], qkv, part.position_rows[here], prepared)
        state = State(
            self._arena.empty((rows, share.heads), np.float32),
            self._arena.empty((rows, share.heads), np.float32),
            self._arena.empty((rows, share.heads, layer.value_dim), np.float32),
        )
        spec = AttentionSpec(
            kv_head_of_q=share.kv_head_of_q,
            scale=1.0 / math.sqrt(layer.head_dim),
            causal=self.spec.causal,
            window=layer.window,
            softcap=layer.softcap,
        )
        ring = self._transports["cp"]
        block = cache.block(part.index)
        ring_attention(
            self._kernels, ring, self._arena, q, block, part.layouts, cache.layouts, spec, state
        )
        for here in self._chunks(rows):
            with self._arena.scope():
                seen = state.rows(here.start, here.stop)
                o = self._arena.empty(seen.out.shape, self.dtype)
                lse = self._arena.empty(seen.row_max.shape, np.float32)
                self._kernels.finish(seen, o, lse)
                o = o.reshape(len(o), share.heads * layer.value_dim)
                self._add(index, "attention", "out", o, x, here, part.layout, probe)

    def _project(
        self,
        index: int,
        x: Array,
        qkv: tuple[Array, Array, Array],
        position_rows: NDArray[np.int32],
        prepared: Prepared,
    ) -> None:
        """Fill q, k and v of some rows: norm, linears, q/k-norm, RoPE."""
        layer, at = self.spec.blocks[index], f"layers.{index}.attention"
        normed = self._normed(f"{at}_norm", layer, x)
        for name, out in zip("qkv", qkv, strict=True):
            flat = out.reshape(len(out), out.shape[1] * out.shape[2])
            bias = self._weights.vectors.get(f"{at}.{name}_bias")
            self._kernels.linear(normed, self._weights.matrices[f"{at}.{name}"], flat, bias=bias)
            if name == "v":
                continue
            if layer.qk_norm:
                heads = out.reshape(-1, layer.head_dim)
                gain = self._weights.vectors[f"{at}.{name}_norm"]
                self._kernels.norm(heads, gain, None, heads, eps=layer.norm_eps, kind="rms")
            if layer.rope is not None:
                cos, sin = prepared.rope[layer.rope, layer.rotated_dim]
                self._kernels.rope(out, cos, sin, position_rows)

    def _mlp(self, index: int, x: Array, layout: Layout, probe: Probe | None) -> None:
        """Add the MLP: x [rows, d] -> hidden [rows, columns of this rank] -> [rows, d]."""
        layer, at = self.spec.blocks[index], f"layers.{index}.mlp"
        up, gate = self._weights.matrices[f"{at}.up"], self._weights.matrices.get(f"{at}.gate")
        up_bias, gate_bias = (self._weights.vectors.get(f"{at}.{n}_bias") for n in ("up", "gate"))
        act = layer.activation
        for here in self._chunks(len(x)):
            with self._arena.scope():
                normed = self._normed(f"{at}_norm", layer, x[here])
                hidden = self._arena.empty((len(normed), up.n), self.dtype)
                if gate is None:
                    self._kernels.linear(normed, up, hidden, bias=up_bias, activation=act)
                else:
                    self._kernels.gated_linear(
                        normed,
                        gate,
                        up,
                        hidden,
                        activation=act,
                        gate_bias=gate_bias,
                        up_bias=up_bias,
                    )
                self._transports["pp"].poll()
                self._add(index, "mlp", "down", hidden, x, here, layout, probe)

    def _add(
        self,
        index: int,
        branch: str,
        weight: str,
        hidden: Array,
        x: Array,
        here: slice,
        layout: Layout,
        probe: Probe | None,
    ) -> None:
        """Add hidden times a branch's last weight to the rows `here` of the residual stream."""
        name = f"layers.{index}.{branch}"

        def see(array: Array) -> None:
            if probe is not None:
                probe(name, array, layout.slice(here.start, here.stop))

        add_branch(
            self._kernels,
            self._tp,
            self._arena,
            hidden,
            self._weights.matrices[f"{name}.{weight}"],
            self._weights.vectors.get(f"{name}.{weight}_bias"),
            x[here],
            see if probe is not None else None,
        )

    def _normed(self, name: str, layer: LayerSpec, rows: Array) -> Array:
        out = self._arena.empty(rows.shape, self.dtype)
        vectors = self._weights.vectors
        weight, bias = vectors[f"{name}.weight"], vectors.get(f"{name}.bias")
        self._kernels.norm(rows, weight, bias, out, eps=layer.norm_eps, kind=layer.norm)
        return out

    def _head(self, x: Array, part: MicroBatch, out: Array) -> None:
        """Compute the logits of the rows that end a sequence."""
        with self._arena.scope():
            rows = self._arena.empty((len(part.last_rows), self.spec.d_model), self.dtype)
            self._kernels.embed(part.last_rows, x, rows)
            normed = self._normed("final_norm", self.spec.blocks[-1], rows)
            self._kernels.linear(normed, self._weights.matrices["head"], out)

    def _cache(self, index: int, capacity: int) -> KvCache:
        layer, heads = self.spec.blocks[index], self._weights.heads[index].n_kv_heads
        return KvCache(
            self._arena,
            capacity,
            (heads, layer.head_dim),
            (heads, layer.value_dim),
            self.dtype,
            self._transports["cp"].size,
        )

    def _rope_table(
        self, rope: Rope, rotated: int, positions: NDArray[np.int64]
    ) -> tuple[Array, Array]:
        shape = (len(positions), rotated // 2)
        cos, sin = self._arena.empty(shape, np.float32), self._arena.empty(shape, np.float32)
        if not self._arena.dry:
            frequency = rope.theta ** (-np.arange(rotated // 2) * 2.0 / rotated)
            angle = (positions / rope.scaling_factor)[:, None] * frequency
            cos[:], sin[:] = np.cos(angle), np.sin(angle)
        return cos, sin

    def _chunks(self, rows: int) -> list[slice]:
        firsts = range(0, rows, ROW_CHUNK)
        chunks = [slice(first, min(first + ROW_CHUNK, rows)) for first in firsts]
        return [*chunks[:1], *chunks[1:][-1:]] if self._rehearsal else chunks
