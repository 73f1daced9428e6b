"""The attention branch: x + out(attention(q, k, v)), heads over `tp`, keys round the `cp` ring."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Array
from pympa.batch import KvCache, MicroBatch
from pympa.block.context import Context, Probe
from pympa.kernels import AttentionSpec, State
from pympa.parallel.ring import ring_attention
from pympa.parallel.tensor import add_branch


class Attention:
    """The first branch of a block.

    Args:
        context: the block.
    """

    def __init__(self, context: Context) -> None:
        layer = context.layer
        self._context = context
        self._cp, self._tp = (context.rank.transports[axis] for axis in ("cp", "tp"))
        self._share = context.weights.heads[context.index]
        self._spec = AttentionSpec(
            kv_head_of_q=self._share.kv_head_of_q,
            scale=1.0 / math.sqrt(layer.head_dim),
            causal=context.spec.causal,
            window=layer.window,
            softcap=layer.softcap,
        )

    def cache(self, capacity: int) -> KvCache:
        """Return room for the keys and values of `capacity` rows, in the arena."""
        layer, heads = self._context.layer, self._share.n_kv_heads
        return KvCache(
            self._context.arena,
            capacity,
            (heads, layer.head_dim),
            (heads, layer.value_dim),
            self._context.dtype,
            self._cp.size,
        )

    def __call__(
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
        context, heads, rows = self._context, self._share.heads, len(x)
        arena, layer = context.arena, context.layer
        k, v = cache.append(part)
        q = arena.empty((rows, heads, layer.head_dim), context.dtype)
        for here in context.chunks(rows):
            with arena.scope():
                self._project(x[here], (q[here], k[here], v[here]), rope, part.position_rows[here])
        state = State(
            arena.empty((rows, heads), np.float32),
            arena.empty((rows, heads), np.float32),
            arena.empty((rows, heads, layer.value_dim), np.float32),
        )
        ring_attention(
            context.kernels,
            self._cp,
            arena,
            q,
            cache.block(part.index),
            part.layouts,
            cache.layouts,
            self._spec,
            state,
        )
        for here in context.chunks(rows):
            with arena.scope():
                self._add_output(x, here, state.rows(here.start, here.stop), part, probe)

    def _project(
        self,
        x: Array,
        qkv: tuple[Array, Array, Array],
        rope: tuple[Array, Array] | None,
        position_rows: NDArray[np.int32],
    ) -> None:
        """Fill q, k and v of some rows: norm, linears, q/k-norm, RoPE."""
        context, kernels, layer = self._context, self._context.kernels, self._context.layer
        normed = context.normed("attention_norm", x)
        for name, out in zip("qkv", qkv, strict=True):
            flat = out.reshape(len(out), out.shape[1] * out.shape[2])
            bias = context.vector(f"attention.{name}_bias")
            kernels.linear(normed, context.matrix(f"attention.{name}"), flat, bias=bias)
            if name == "v":
                continue
            gain = context.vector(f"attention.{name}_norm")
            if gain is not None:
                heads = out.reshape(len(out) * out.shape[1], layer.head_dim)
                kernels.norm(heads, gain, None, heads, eps=layer.norm_eps, kind="rms")
            if rope is not None:
                kernels.rope(out, *rope, position_rows)

    def _add_output(
        self, x: Array, here: slice, state: State, part: MicroBatch, probe: Probe | None
    ) -> None:
        """Normalise some rows' state, project it and add it to the residual stream."""
        context = self._context
        o = context.arena.empty(state.out.shape, context.dtype)
        lse = context.arena.empty(state.row_max.shape, np.float32)
        context.kernels.finish(state, o, lse)

        def see(array: Array) -> None:
            if probe is not None:
                layout = part.layout.slice(here.start, here.stop)
                probe(f"{context.name}.attention", array, layout)

        add_branch(
            context.kernels,
            self._tp,
            context.arena,
            o.reshape(len(o), o.shape[1] * o.shape[2]),
            context.matrix("attention.out"),
            context.vector("attention.out_bias"),
            x[here],
            see if probe is not None else None,
        )
