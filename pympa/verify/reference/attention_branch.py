"""The attention branch of a block, by the formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.spec import LayerSpec, ModelSpec
from pympa.verify.reference.formulas import F64, Rounding, exactly, linear, norm
from pympa.verify.reference.rope import rope
from pympa.verify.reference.rows import (
    BLOCK_ELEMENTS,
    Weight,
    after_branch,
    before_branch,
    for_row_blocks,
    once,
    widest,
)
from pympa.verify.reference.softmax_attention import FEW_ROWS, MOST_SCORES, attention


def attention_branch(
    spec: ModelSpec,
    layer: LayerSpec,
    x: F64,
    weight: Weight,
    query_rows: NDArray[Any],
    rounding: Rounding = exactly,
) -> F64:
    """Return the attention branch of one sequence for some of its rows, before the residual.

    Args:
        spec: the model.
        layer: the block.
        x: the residual stream of the whole sequence `[tokens, d_model]`.
        weight: a function from a name inside the block to a float64 array; called once for each
            name.
        query_rows: the positions whose output is returned.
        rounding: the rounding, see `pympa.verify.reference.model`.

    Returns:
        The branch `[len(query_rows), d_model]`.
    """
    weight, width = once(weight), widest(layer, spec.d_model)
    heads = _Heads(spec, layer, weight, rounding)
    k = np.empty((len(x), layer.n_kv_heads, layer.head_dim))
    v = np.empty((len(x), layer.n_kv_heads, layer.value_dim))

    def make_keys(here: slice) -> None:
        positions = np.arange(here.start, here.stop)
        normed = before_branch(layer, x[here], weight, "attention", rounding)
        k[here], v[here] = heads.keys(normed, positions)

    for_row_blocks(len(x), width, rounding, make_keys)
    out = np.empty((len(query_rows), spec.d_model))
    bias = weight("attention.out_bias") if layer.has_out_bias else None

    def attend(here: slice) -> None:
        rows = query_rows[here]
        normed = before_branch(layer, x[rows], weight, "attention", rounding)
        o, _ = attention(
            heads.queries(normed, rows),
            k,
            v,
            rows,
            np.arange(len(x)),
            kv_head_of_q=[layer.kv_head_of(h) for h in range(layer.heads)],
            scale=layer.scale,
            causal=spec.causal,
            window=layer.window,
            softcap=layer.softcap,
            sinks=weight("attention.sinks") if layer.sinks else None,
            rounding=rounding,
        )
        o = rounding(o.reshape(len(rows), -1))
        y = linear(o, weight("attention.out"), bias, rounding)
        out[here] = after_branch(layer, y, weight, "attention", rounding)

    seen = len(x) if layer.window is None else min(len(x), 2 * layer.window + FEW_ROWS)
    of_scores = seen * BLOCK_ELEMENTS // MOST_SCORES  # the scores of all threads are bounded, too
    for_row_blocks(len(query_rows), max(width, of_scores), rounding, attend)
    return out


class _Heads:
    """The queries, keys and values of normed rows `[rows, d_model]`."""

    def __init__(
        self, spec: ModelSpec, layer: LayerSpec, weight: Weight, rounding: Rounding
    ) -> None:
        self._spec, self._layer = spec, layer
        self._weight, self._round = weight, rounding

    def queries(self, normed: F64, positions: NDArray[Any]) -> F64:
        """Return q `[rows, heads, head_dim]`."""
        latent = self._layer.latent
        if latent is not None and latent.q_rank is not None:
            normed = self._latent(normed, "q_latent", latent.norm_eps)
        return self._rotated(self._normed(self._projected(normed, "q"), "q"), positions)

    def keys(self, normed: F64, positions: NDArray[Any]) -> tuple[F64, F64]:
        """Return k `[rows, kv_heads, head_dim]` and v `[rows, kv_heads, v_head_dim]`."""
        latent = self._layer.latent
        if latent is None:
            k, v = self._projected(normed, "k"), self._projected(normed, "v")
            return self._rotated(self._normed(k, "k"), positions), v
        shared = self._round(linear(normed, self._weight("attention.k_rotated"), None, self._round))
        inner = self._latent(normed, "kv_latent", latent.norm_eps)
        k, v = self._projected(inner, "k"), self._projected(inner, "v")
        everywhere = np.broadcast_to(shared[:, None], (*k.shape[:2], shared.shape[1]))
        return self._rotated(np.concatenate([k, everywhere], axis=2), positions), v

    def _latent(self, normed: F64, name: str, eps: float) -> F64:
        """Return a latent vector of rows after its norm."""
        y = self._round(linear(normed, self._weight(f"attention.{name}"), None, self._round))
        return self._round(norm(y, self._weight(f"attention.{name}_norm"), None, eps, "rms"))

    def _projected(self, normed: F64, name: str) -> F64:
        """Return q, k or v as `[rows, heads, dim]`."""
        heads = self._layer.heads if name == "q" else self._layer.n_kv_heads
        weight = self._weight
        bias = weight(f"attention.{name}_bias") if self._layer.attention_bias else None
        y = linear(normed, weight(f"attention.{name}"), bias, self._round)
        return self._round(y.reshape(len(normed), heads, -1))

    def _normed(self, x: F64, name: str) -> F64:
        """Return q or k `[rows, heads, head_dim]` after its norm, if it has one."""
        layer = self._layer
        if layer.qk_norm == "none":
            return x
        rows = x.reshape(len(x), -1) if layer.qk_norm == "all" else x
        gain, offset = self._weight(f"attention.{name}_norm"), float(layer.norm_offset)
        return self._round(norm(rows, gain, None, layer.norm_eps, "rms", offset)).reshape(x.shape)

    def _rotated(self, x: F64, positions: NDArray[Any]) -> F64:
        """Return q or k after RoPE, if the layer has one."""
        embedding = self._layer.rope
        if embedding is None:
            return x
        return self._round(rope(x, positions, embedding, self._spec.context))
