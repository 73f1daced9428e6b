"""The attention branch: x + out(attention(q, k, v)).

`pympa.model.projections` makes q, k and v of this rank's rows and slices of heads.
Heads are split over `tp`, their slices over `dim`, tokens over `cp`. A rank projects slices, which
become whole heads, then heads of all tokens of an exchanging group; then they attend to the keys of
the ring. A plan that does not split an axis skips its exchange, and uses the same arrays.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pympa.kernels import AttentionSpec, KvBlock, State
from pympa.model.batch import MicroBatch
from pympa.model.kv_cache import KvCache, VisibleKeys
from pympa.model.layer import Layer, Probe
from pympa.model.projections import Projections, RopeTable
from pympa.parallel.grid import attend_by_scores, exchange_queries, gather_heads, return_outputs
from pympa.parallel.ring import (
    BlockSource,
    RingBlocks,
    attend,
    fold_in_pieces,
    gathered,
    read_in_place,
    sent_round_the_ring,
)
from pympa.parallel.tensor import add_branch
from pympa.parallel.ulysses import heads_for_tokens, tokens_for_heads
from pympa.plan.layout import Bounds, Layout, split
from pympa.runtime.arena import Array


class Attention:
    """The first branch of a layer.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: Layer) -> None:
        spec, plan = layer.spec, layer.resources.mesh.plan
        transports = layer.resources.transports
        self._layer = layer
        self._tp, self._dim = transports["tp"], transports["dim"]
        self._ulysses, self._ring = transports["ulysses"], transports["ring"]
        self._heads = layer.weights.heads[layer.index]
        self._slices = layer.weights.slices[layer.index]
        self._projections = Projections(layer)
        self._dim_algo = plan.dim_algo if plan.dim > 1 else None
        self._in_place = self._ring.shares_memory and plan.cp_scheme != "allgather"
        self._source: BlockSource = gathered
        if self._in_place:
            self._source = read_in_place
        elif plan.cp_scheme != "allgather" and spec.window is None:
            self._source = sent_round_the_ring
        self._whole_qk = self._dim_algo in (None, "exchange", "gather")
        self._whole_v = self._dim_algo in (None, "exchange")
        self._qk_dim = spec.head_dim if self._whole_qk else self._slices.qk_width
        self._v_dim = spec.value_dim if self._whole_v else self._slices.v_width
        kv_of_q = self._heads.kv_head_of_q
        self._q_parts = split(self._heads.heads, self._ulysses.size)
        self._kv_parts = [(int(kv_of_q[a]), int(kv_of_q[b - 1]) + 1) for a, b in self._q_parts]
        first, last = self._q_parts[self._ulysses.index]
        kv_first, kv_last = self._kv_parts[self._ulysses.index]
        self._ring_heads, self._ring_kv_heads = last - first, kv_last - kv_first
        alone = self._dim_algo == "independent" and spec.attention_scale is None
        sinks = layer.vector("attention.sinks")
        self._sinks = None if sinks is None else sinks[first:last]
        self._spec = AttentionSpec(
            kv_head_of_q=kv_of_q[first:last] - np.int32(kv_first),
            scale=1.0 / math.sqrt(self._qk_dim) if alone else spec.scale,
            causal=layer.model.causal,
            window=spec.window,
            softcap=spec.softcap,
        )

    @property
    def kv_row_bytes(self) -> int:
        """The bytes of a token's keys and values on this rank."""
        return self._ring_kv_heads * (self._qk_dim + self._v_dim) * self._layer.dtype.itemsize

    def cache(self, parts: Sequence[MicroBatch], visible: VisibleKeys) -> KvCache:
        """Return a cache for the keys and values of micro-batches, in the arena.

        Args:
            parts: the micro-batches.
            visible: the visible keys of each micro-batch.
        """
        return KvCache(
            self._layer.arena,
            sum(part.ring_keys[part.ring_index].rows for part in parts),
            (self._ring_kv_heads, self._qk_dim),
            (self._ring_kv_heads, self._v_dim),
            self._layer.dtype,
            visible,
            shared=self._in_place,
        )

    def __call__(
        self,
        x: Array,
        part: MicroBatch,
        rope: RopeTable | None,
        cache: KvCache,
        probe: Probe | None,
    ) -> None:
        """Add attention: x [rows, d] -> q, k, v [rows, heads, dim] -> o -> [rows, d]. Collective.

        Args:
            x: the residual stream.
            part: the micro-batch of the rows.
            rope: the tables of cos and sin, or None.
            cache: the cache with earlier keys and values, and space for those of `x`.
            probe: a function that gets the branch, or None.
        """
        arena, kernels = self._layer.arena, self._layer.kernels
        self._ring.wait_for_readers()  # of the memory that k and v are written to
        k, v = cache.new()
        q_layout = part.ring_queries[part.ring_index]
        q = arena.empty((q_layout.rows, self._ring_heads, self._qk_dim), self._layer.dtype)
        with arena.scope():
            self._make_qkv(x, part, rope, {"q": q, "k": k, "v": v})
        state = State(
            arena.empty((q_layout.rows, self._ring_heads), np.float32),
            arena.empty((q_layout.rows, self._ring_heads), np.float32),
            arena.empty((q_layout.rows, self._ring_heads, self._v_dim), np.float32),
        )
        own, queries = cache.block(part.ring_index), part.ring_queries
        blocks = RingBlocks(self._ring, arena, own, cache.layouts, queries, self._spec)

        def fold(kv: KvBlock) -> None:
            if self._dim_algo == "reduce":
                self._sum_scores(q, q_layout, kv, state)
            else:
                fold_in_pieces(kernels, self._ring, q, q_layout, kv, self._spec, state)

        attend(kernels, blocks, self._source, fold, state, self._sinks)
        self._add_output(x, state, part, probe)

    def _make_qkv(
        self, x: Array, part: MicroBatch, rope: RopeTable | None, out: dict[str, Array]
    ) -> None:
        """Fill q, k and v from the residual stream: norm, linears, q/k-norm, RoPE, exchanges."""
        layer = self._layer
        heads = {"q": self._heads.heads, "k": self._heads.kv_heads, "v": self._heads.kv_heads}
        rows = {"q": part.queries[part.index].rows, "k": len(x), "v": len(x)}
        dims = {"q": self._qk_dim, "k": self._qk_dim, "v": self._v_dim}
        whole, sliced = dict(out), {}
        for name in out:
            if self._ulysses.size > 1:
                shape = rows[name], heads[name], dims[name]
                whole[name] = self._ulysses.empty(shape, layer.dtype)
            sliced[name] = whole[name]
            if self._becomes_whole(name):
                width = self._slices.v_width if name == "v" else self._slices.qk_width
                sliced[name] = self._dim.empty((len(x), heads[name], width), layer.dtype)
        self._projections(x, part, rope, sliced)
        for name in out:
            with layer.arena.scope():
                self._make_whole(name, sliced[name], whole[name], part)
            if name in self._projections.rotated_later:
                rotated = part.query_parts if name == "q" and part.query_parts else part
                self._norm_and_rotate(name, whole[name], rope, rotated.position_rows)
            if self._ulysses.size > 1:
                layouts = part.queries if name == "q" else part.layouts
                with layer.arena.scope():
                    heads_for_tokens(
                        layer.kernels,
                        self._ulysses,
                        whole[name],
                        self._q_parts if name == "q" else self._kv_parts,
                        out[name],
                        part.group_rows(layouts),
                    )

    def _becomes_whole(self, name: str) -> bool:
        """Return whether slices of q, k or v become whole heads."""
        return self._dim_algo is not None and (self._whole_v if name == "v" else self._whole_qk)

    def _make_whole(self, name: str, sliced: Array, whole: Array, part: MicroBatch) -> None:
        """Make whole heads from slices of q, k or v, if the plan requires it."""
        kernels, parts = self._layer.kernels, part.query_parts
        if not self._becomes_whole(name):
            return
        if name == "q" and parts is not None:
            exchange_queries(
                kernels, self._dim, sliced, parts.order, parts.rows, self._slices.qk, whole
            )
        else:
            slices = self._slices.v if name == "v" else self._slices.qk
            gather_heads(kernels, self._dim, sliced, slices, whole)

    def _norm_and_rotate(
        self, name: str, x: Array, rope: RopeTable | None, positions: NDArray[np.int32]
    ) -> None:
        """Apply q/k-norm and RoPE to x [rows, heads, dim], given each row's row of the tables."""
        layer = self._layer
        gain = layer.vector(f"attention.{name}_norm") if layer.spec.qk_norm == "head" else None
        if gain is not None:
            flat = x.reshape(len(x) * x.shape[1], x.shape[2])
            offset, eps = float(layer.spec.norm_offset), layer.spec.norm_eps
            layer.kernels.norm(flat, gain, None, flat, eps=eps, kind="rms", offset=offset)
        self._projections.rotate(x, rope, positions, whole=self._whole_qk)

    def _sum_scores(self, q: Array, q_layout: Layout, kv: KvBlock, state: State) -> None:
        """Fold one block of keys into the state, one sequence after the other. Collective."""
        layer = self._layer
        for kind, alike in _sequence_rows(q_layout, kv.layout):
            for rows, keys in layer.resources.loops.chunks(alike, kind):
                attend_by_scores(
                    layer.kernels,
                    self._dim,
                    layer.arena,
                    q[slice(*rows)],
                    q_layout.slice(*rows),
                    kv.slice(*keys),
                    self._spec,
                    state.rows(*rows),
                )

    def _add_output(self, x: Array, state: State, part: MicroBatch, probe: Probe | None) -> None:
        """Normalise the state, return outputs to their ranks, project, add to x [rows, d]."""
        layer, kernels = self._layer, self._layer.kernels
        moves = self._ulysses.size > 1 or self._dim_algo == "exchange"
        after = partial(layer.after, "attention") if layer.has_post_norm("attention") else None
        with layer.arena.scope():
            outputs = self._returned_outputs(state, part, len(x)) if moves else None
            for here in layer.chunks(len(x)):
                with layer.arena.scope():
                    if outputs is not None:
                        o = outputs[here]
                    else:
                        o = self._finished(state.rows(here.start, here.stop))
                    flat = o.reshape(len(o), o.shape[1] * o.shape[2])
                    add_branch(
                        kernels,
                        self._tp,
                        layer.arena,
                        partial(kernels.linear, flat, layer.matrix("attention.out")),
                        layer.vector("attention.out_bias"),
                        x[here],
                        layer.probed(probe, "attention", part.layout, here),
                        after,
                    )

    def _returned_outputs(self, state: State, part: MicroBatch, rows: int) -> Array:
        """Return the outputs of this rank's rows and slice, [rows, heads, slice]."""
        layer, heads = self._layer, self._heads.heads
        o = self._finished(state)
        if self._ulysses.size > 1:
            shape = part.queries[part.index].rows, heads, self._v_dim
            own_rows = self._ulysses.empty(shape, layer.dtype)
            counts = part.group_rows(part.queries)
            tokens_for_heads(layer.kernels, self._ulysses, o, self._q_parts, own_rows, counts)
            o = own_rows
        parts = part.query_parts
        if parts is not None:
            own_slice = self._dim.empty((rows, heads, self._slices.v_width), layer.dtype)
            return_outputs(
                layer.kernels, self._dim, o, parts.inverse, parts.rows, self._slices.v, own_slice
            )
            o = own_slice
        return o

    def _finished(self, state: State) -> Array:
        """Return the normalised outputs of a state."""
        layer = self._layer
        o = layer.arena.empty(state.out.shape, layer.dtype)
        lse = layer.arena.empty(state.row_max.shape, np.float32)
        layer.kernels.finish(state, o, lse)
        return o


def _sequence_rows(q: Layout, k: Layout) -> Iterator[tuple[Hashable, list[tuple[Bounds, Bounds]]]]:
    """Yield the rows of queries and the rows of keys of each sequence.

    Successive sequences with the same positions are yielded together, with these positions. If the
    rows of a sequence are not consecutive, all rows are yielded at once.
    """
    of_q, of_k = q.by_sequence(), k.by_sequence()
    if of_q is None or of_k is None:
        yield None, [((0, q.rows), (0, k.rows))]
        return
    both = [s for s in of_q if s in of_k]
    for pieces, alike in itertools.groupby(both, lambda s: (q.pieces[s], k.pieces[s])):
        yield pieces, [(of_q[s], of_k[s]) for s in alike]
