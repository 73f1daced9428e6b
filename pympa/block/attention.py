"""The attention branch: x + out(attention(q, k, v)).

Heads lie over `tp`, their slices over `dim`, tokens over `cp`. A projected slice becomes whole
heads, then all tokens of an exchanging group, then meets the keys of the ring; what a plan does not
split it does not move, and then the arrays of these steps are the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Array
from pympa.batch import MicroBatch
from pympa.block.context import Context, Probe
from pympa.kernels import AttentionSpec, KvBlock, State
from pympa.kv_cache import KeysAtHand, KvCache
from pympa.layout import Layout, Span, split
from pympa.parallel.grid import attend_by_scores, exchange_queries, gather_heads, return_outputs
from pympa.parallel.ring import gathered_attention, ring_attention, shared_attention
from pympa.parallel.tensor import add_branch
from pympa.parallel.ulysses import heads_for_tokens, tokens_for_heads

Rope = tuple[Array, Array]


class Attention:
    """The first branch of a block.

    Args:
        context: the block.
    """

    def __init__(self, context: Context) -> None:
        layer, plan = context.layer, context.rank.mesh.plan
        transports = context.rank.transports
        self._context = context
        self._tp, self._dim = transports["tp"], transports["dim"]
        self._ulysses, self._ring = transports["ulysses"], transports["ring"]
        self._share = context.weights.heads[context.index]
        self._slices = context.weights.slices[context.index]
        self._algo = plan.dim_algo if plan.dim > 1 else None
        self._shares = self._ring.shares_memory and plan.cp_scheme != "allgather"
        self._attend = shared_attention if self._shares else ring_attention
        if plan.cp_scheme == "allgather":
            self._attend = gathered_attention
        self._whole_qk = self._algo in (None, "exchange", "gather")
        self._whole_v = self._algo in (None, "exchange")
        self._qk_dim = layer.head_dim if self._whole_qk else self._slices.qk_width
        self._v_dim = layer.value_dim if self._whole_v else self._slices.v_width
        kv_of_q = self._share.kv_head_of_q
        self._q_spans = split(self._share.heads, self._ulysses.size)
        self._kv_spans = [(int(kv_of_q[a]), int(kv_of_q[b - 1]) + 1) for a, b in self._q_spans]
        (first, last), (kv_first, kv_last) = self._own(self._q_spans), self._own(self._kv_spans)
        self._heads, self._kv_heads = last - first, kv_last - kv_first
        whole = self._qk_dim if self._algo == "independent" else layer.head_dim
        self._spec = AttentionSpec(
            kv_head_of_q=kv_of_q[first:last] - np.int32(kv_first),
            scale=1.0 / math.sqrt(whole),
            causal=context.spec.causal,
            window=layer.window,
            softcap=layer.softcap,
        )

    def cache(self, parts: Sequence[MicroBatch], at_hand: KeysAtHand) -> KvCache:
        """Return room for the keys and values of micro-batches, in the arena.

        Args:
            parts: the micro-batches.
            at_hand: tells which of their keys count.
        """
        return KvCache(
            self._context.arena,
            sum(part.ring_keys[part.ring_index].rows for part in parts),
            (self._kv_heads, self._qk_dim),
            (self._kv_heads, self._v_dim),
            self._context.dtype,
            at_hand,
            shared=self._shares,
        )

    def __call__(
        self,
        x: Array,
        part: MicroBatch,
        rope: Rope | None,
        cache: KvCache,
        probe: Probe | None,
    ) -> None:
        """Add attention: x [rows, d] -> q, k, v [rows, heads, dim] -> o -> [rows, d]. Collective.

        Args:
            x: residual stream.
            part: which tokens the rows are.
            rope: cos and sin tables, float32 `[positions, half]`, or None.
            cache: earlier keys and values, and room for those of `x`.
            probe: sees the branch, or None.
        """
        arena, dtype = self._context.arena, self._context.dtype
        self._ring.settle()  # nobody still reads the memory that k and v go to
        k, v = cache.new()
        rows = part.ring_queries[part.ring_index].rows
        q = arena.empty((rows, self._heads, self._qk_dim), dtype)
        with arena.scope():
            self._fill(x, part, rope, {"q": q, "k": k, "v": v})
        state = State(
            arena.empty((rows, self._heads), np.float32),
            arena.empty((rows, self._heads), np.float32),
            arena.empty((rows, self._heads, self._v_dim), np.float32),
        )
        self._attend(
            self._context.kernels,
            self._ring,
            arena,
            q,
            cache.block(part.ring_index),
            part.ring_queries,
            cache.layouts,
            self._spec,
            state,
            self._sum_scores if self._algo == "reduce" else None,
        )
        self._add_output(x, state, part, probe)

    def _sum_scores(self, q: Array, q_layout: Layout, kv: KvBlock, state: State) -> None:
        """Fold one block of keys into the state, one sequence after the other. Collective."""
        context = self._context
        for kind, alike in _pieces(q_layout, kv.layout):
            for rows, keys in context.rank.loops.chunks(alike, kind):
                here, there = slice(*rows), slice(*keys)
                attend_by_scores(
                    context.kernels,
                    self._dim,
                    context.arena,
                    q[here],
                    q_layout.slice(*rows),
                    KvBlock(kv.k[there], kv.v[there], kv.layout.slice(*keys)),
                    self._spec,
                    state.rows(*rows),
                )

    def _fill(self, x: Array, part: MicroBatch, rope: Rope | None, final: dict[str, Array]) -> None:
        """Fill q, k and v from the residual stream: norm, linears, q/k-norm, RoPE, exchanges."""
        context, share = self._context, self._share
        heads = {"q": share.heads, "k": share.n_kv_heads, "v": share.n_kv_heads}
        rows = {"q": part.queries[part.index].rows, "k": len(x), "v": len(x)}
        dims = {"q": self._qk_dim, "k": self._qk_dim, "v": self._v_dim}
        whole, sliced = dict(final), {}
        for name in final:
            if self._ulysses.size > 1:
                shape = rows[name], heads[name], dims[name]
                whole[name] = self._ulysses.empty(shape, context.dtype)
            sliced[name] = whole[name]
            if self._moves(name):
                width = self._slices.v_width if name == "v" else self._slices.qk_width
                sliced[name] = self._dim.empty((len(x), heads[name], width), context.dtype)
        for here in context.chunks(len(x)):
            with context.arena.scope():
                self._project(x[here], {name: sliced[name][here] for name in sliced})
        for name in final:
            with context.arena.scope():
                self._make_whole(name, sliced[name], whole[name], part)
            if name != "v":
                turned = part.query_parts if name == "q" and part.query_parts else part
                self._turn(name, whole[name], rope, turned.position_rows)
            if self._ulysses.size > 1:
                layouts = part.queries if name == "q" else part.layouts
                spans = self._q_spans if name == "q" else self._kv_spans
                with context.arena.scope():
                    heads_for_tokens(
                        context.kernels,
                        self._ulysses,
                        whole[name],
                        spans,
                        final[name],
                        part.group_rows(layouts),
                    )

    def _moves(self, name: str) -> bool:
        """Tell whether slices of q, k or v become whole heads."""
        return self._algo is not None and (self._whole_v if name == "v" else self._whole_qk)

    def _project(self, x: Array, out: dict[str, Array]) -> None:
        context = self._context
        normed = context.normed("attention_norm", x)
        for name, rows in out.items():
            flat = rows.reshape(len(rows), rows.shape[1] * rows.shape[2])
            bias = context.vector(f"attention.{name}_bias")
            context.kernels.linear(normed, context.matrix(f"attention.{name}"), flat, bias=bias)

    def _make_whole(self, name: str, sliced: Array, whole: Array, part: MicroBatch) -> None:
        """Turn slices of q, k or v into whole heads, if the plan does."""
        kernels = self._context.kernels
        if not self._moves(name):
            return
        parts = part.query_parts
        if name == "q" and parts is not None:
            exchange_queries(
                kernels, self._dim, sliced, parts.order, parts.rows, self._slices.qk, whole
            )
        else:
            slices = self._slices.v if name == "v" else self._slices.qk
            gather_heads(kernels, self._dim, sliced, slices, whole)

    def _turn(self, name: str, x: Array, rope: Rope | None, index: NDArray[np.int32]) -> None:
        """Apply q/k-norm and RoPE to rows [rows, heads, dim], whose positions are `index`."""
        context, layer = self._context, self._context.layer
        gain = context.vector(f"attention.{name}_norm")
        if gain is not None:
            flat = x.reshape(len(x) * x.shape[1], x.shape[2])
            context.kernels.norm(flat, gain, None, flat, eps=layer.norm_eps, kind="rms")
        if rope is not None:
            first, last = 0, rope[0].shape[1]
            if not self._whole_qk:
                first, last = split(last, self._dim.size)[self._dim.index]
            cos, sin = (table[:, first:last] for table in rope)
            context.kernels.rope(x, cos, sin, index)

    def _add_output(self, x: Array, state: State, part: MicroBatch, probe: Probe | None) -> None:
        """Normalise the state, bring outputs home, project them and add them to x [rows, d]."""
        context, arena = self._context, self._context.arena
        moved = self._ulysses.size > 1 or self._algo == "exchange"
        with arena.scope():
            home = self._bring_home(state, part, len(x)) if moved else None
            for here in context.chunks(len(x)):
                with arena.scope():
                    o = home[here] if home is not None else self._finished(state.rows(*_ends(here)))
                    self._add(x, here, o, part, probe)

    def _bring_home(self, state: State, part: MicroBatch, rows: int) -> Array:
        """Return outputs of this rank's rows and slice, [rows, heads, slice]."""
        context = self._context
        kernels, heads = context.kernels, self._share.heads
        o = self._finished(state)
        if self._ulysses.size > 1:
            back = self._ulysses.empty(
                (part.queries[part.index].rows, heads, self._v_dim), context.dtype
            )
            counts = part.group_rows(part.queries)
            tokens_for_heads(kernels, self._ulysses, o, self._q_spans, back, counts)
            o = back
        parts = part.query_parts
        if parts is not None:
            width = self._slices.v_width
            home = self._dim.empty((rows, heads, width), context.dtype)
            return_outputs(kernels, self._dim, o, parts.places, parts.rows, self._slices.v, home)
            o = home
        return o

    def _finished(self, state: State) -> Array:
        context = self._context
        o = context.arena.empty(state.out.shape, context.dtype)
        lse = context.arena.empty(state.row_max.shape, np.float32)
        context.kernels.finish(state, o, lse)
        return o

    def _add(self, x: Array, here: slice, o: Array, part: MicroBatch, probe: Probe | None) -> None:
        context = self._context

        def see(array: Array) -> None:
            if probe is not None:
                probe(f"{context.name}.attention", array, part.layout.slice(*_ends(here)))

        add_branch(
            context.kernels,
            self._tp,
            context.arena,
            partial(
                context.kernels.linear,
                o.reshape(len(o), o.shape[1] * o.shape[2]),
                context.matrix("attention.out"),
            ),
            context.vector("attention.out_bias"),
            x[here],
            see if probe is not None else None,
        )

    def _own(self, spans: Sequence[Span]) -> Span:
        return spans[self._ulysses.index]


def _pieces(q: Layout, k: Layout) -> Iterator[tuple[Hashable, list[tuple[Span, Span]]]]:
    """Yield the rows of queries and those of keys of each sequence.

    Sequences that follow each other and differ in nothing else come together, with what they have
    in common. Where a sequence lies in several places, everything is one piece.
    """
    of_q, of_k = q.by_sequence(), k.by_sequence()
    if of_q is None or of_k is None:
        yield None, [((0, q.rows), (0, k.rows))]
        return
    both = [s for s in of_q if s in of_k]
    for spans, alike in itertools.groupby(both, lambda s: (q.spans[s], k.spans[s])):
        yield spans, [(of_q[s], of_k[s]) for s in alike]


def _ends(here: slice) -> Span:
    return here.start, here.stop
