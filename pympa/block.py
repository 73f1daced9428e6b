"""One transformer block of one rank: the attention branch and the MLP branch.

Both add to the residual stream `[rows, d_model]` in place and keep its layout, so blocks compose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Arena, Array
from pympa.batch import KvCache, MicroBatch
from pympa.kernels import AttentionSpec, Kernels, PackedWeight, State
from pympa.layout import Layout
from pympa.parallel.ring import ring_attention
from pympa.parallel.tensor import add_branch
from pympa.shards import Shards
from pympa.spec import ModelSpec
from pympa.transport import Transport

ROW_CHUNK = 1024  # rows whose MLP hidden state exists at a time; changes memory, never bits

Probe = Callable[[str, Array, Layout], None]
"""Sees an output by name, rows `[rows, d_model]` and their layout."""


class Block:
    """One block of a rank's stage.

    Args:
        spec: the model.
        index: of the block in the model.
        weights: this rank's.
        kernels: the backend.
        transports: one for each axis of the mesh.
        arena: memory of a step.
        dtype: of weights and activations.
        rehearsal: skip all row chunks but the first and the last, which are like the others.
    """

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        weights: Shards,
        kernels: Kernels,
        transports: Mapping[str, Transport],
        arena: Arena,
        dtype: np.dtype[Any],
        *,
        rehearsal: bool,
    ) -> None:
        self._layer = spec.blocks[index]
        self._name = f"layers.{index}"
        self._weights = weights
        self._kernels = kernels
        self._transports = transports
        self._arena = arena
        self._dtype = dtype
        self._rehearsal = rehearsal
        self._share = weights.heads[index]
        self._attention = AttentionSpec(
            kv_head_of_q=self._share.kv_head_of_q,
            scale=1.0 / math.sqrt(self._layer.head_dim),
            causal=spec.causal,
            window=self._layer.window,
            softcap=self._layer.softcap,
        )

    def cache(self, capacity: int) -> KvCache:
        """Return room for the keys and values of `capacity` rows, in the arena."""
        return KvCache(
            self._arena,
            capacity,
            (self._share.n_kv_heads, self._layer.head_dim),
            (self._share.n_kv_heads, self._layer.value_dim),
            self._dtype,
            self._transports["cp"].size,
        )

    def attend(
        self,
        x: Array,
        part: MicroBatch,
        rope: tuple[Array, Array] | None,
        cache: KvCache,
        probe: Probe | None,
    ) -> None:
        """Add attention: x [rows, d] -> q, k, v [rows, heads, dim] -> ring -> o -> [rows, d].

        Args:
            x: residual stream.
            part: which tokens the rows are.
            rope: cos and sin tables, float32 `[positions, half]`, or None.
            cache: earlier keys and values; gets those of `x`.
            probe: sees the branch, or None.
        """
        layer, heads, rows = self._layer, self._share.heads, len(x)
        k, v = cache.append(part)
        q = self._arena.empty((rows, heads, layer.head_dim), self._dtype)
        for here in self._chunks(rows):
            with self._arena.scope():
                self._project(x[here], (q[here], k[here], v[here]), rope, part.position_rows[here])
        state = State(
            self._arena.empty((rows, heads), np.float32),
            self._arena.empty((rows, heads), np.float32),
            self._arena.empty((rows, heads, layer.value_dim), np.float32),
        )
        ring_attention(
            self._kernels,
            self._transports["cp"],
            self._arena,
            q,
            cache.block(part.index),
            part.layouts,
            cache.layouts,
            self._attention,
            state,
        )
        for here in self._chunks(rows):
            with self._arena.scope():
                seen = state.rows(here.start, here.stop)
                o = self._arena.empty(seen.out.shape, self._dtype)
                lse = self._arena.empty(seen.row_max.shape, np.float32)
                self._kernels.finish(seen, o, lse)
                o = o.reshape(len(o), heads * layer.value_dim)
                self._add("attention", "out", o, x, here, part.layout, probe)

    def feed_forward(self, x: Array, layout: Layout, probe: Probe | None) -> None:
        """Add the MLP: x [rows, d] -> hidden [rows, columns of this rank] -> [rows, d]."""
        layer = self._layer
        up, gate = self._matrix("mlp.up"), self._weights.matrices.get(f"{self._name}.mlp.gate")
        for here in self._chunks(len(x)):
            with self._arena.scope():
                normed = self._normed("mlp_norm", x[here])
                hidden = self._arena.empty((len(normed), up.n), self._dtype)
                if gate is None:
                    self._kernels.linear(
                        normed,
                        up,
                        hidden,
                        bias=self._vector("mlp.up_bias"),
                        activation=layer.activation,
                    )
                else:
                    self._kernels.gated_linear(
                        normed,
                        gate,
                        up,
                        hidden,
                        activation=layer.activation,
                        gate_bias=self._vector("mlp.gate_bias"),
                        up_bias=self._vector("mlp.up_bias"),
                    )
                self._transports["pp"].poll()
                self._add("mlp", "down", hidden, x, here, layout, probe)

    def _project(
        self,
        x: Array,
        qkv: tuple[Array, Array, Array],
        rope: tuple[Array, Array] | None,
        position_rows: NDArray[np.int32],
    ) -> None:
        """Fill q, k and v of some rows: norm, linears, q/k-norm, RoPE."""
        layer = self._layer
        normed = self._normed("attention_norm", x)
        for name, out in zip("qkv", qkv, strict=True):
            flat = out.reshape(len(out), out.shape[1] * out.shape[2])
            bias = self._vector(f"attention.{name}_bias")
            self._kernels.linear(normed, self._matrix(f"attention.{name}"), flat, bias=bias)
            if name == "v":
                continue
            gain = self._vector(f"attention.{name}_norm")
            if gain is not None:
                heads = out.reshape(len(out) * out.shape[1], layer.head_dim)
                self._kernels.norm(heads, gain, None, heads, eps=layer.norm_eps, kind="rms")
            if rope is not None:
                self._kernels.rope(out, *rope, position_rows)

    def _add(
        self,
        branch: str,
        weight: str,
        hidden: Array,
        x: Array,
        here: slice,
        layout: Layout,
        probe: Probe | None,
    ) -> None:
        """Add hidden times a branch's last weight to the rows `here` of the residual stream."""

        def see(array: Array) -> None:
            if probe is not None:
                probe(f"{self._name}.{branch}", array, layout.slice(here.start, here.stop))

        add_branch(
            self._kernels,
            self._transports["tp"],
            self._arena,
            hidden,
            self._matrix(f"{branch}.{weight}"),
            self._vector(f"{branch}.{weight}_bias"),
            x[here],
            see if probe is not None else None,
        )

    def _normed(self, name: str, rows: Array) -> Array:
        return self._weights.normed(f"{self._name}.{name}", self._layer, rows)

    def _matrix(self, name: str) -> PackedWeight:
        return self._weights.matrices[f"{self._name}.{name}"]

    def _vector(self, name: str) -> Array | None:
        return self._weights.vectors.get(f"{self._name}.{name}")

    def _chunks(self, rows: int) -> list[slice]:
        firsts = range(0, rows, ROW_CHUNK)
        chunks = [slice(first, min(first + ROW_CHUNK, rows)) for first in firsts]
        return [*chunks[:1], *chunks[1:][-1:]] if self._rehearsal else chunks
