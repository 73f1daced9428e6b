"""Branches of a block and the whole model, by the formulas, in blocks of rows.

`rounding` makes the oracle emulate a run: exact except for rounding to a dtype and float32 sums, at
the points where every run has them.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.spec import LayerSpec, LinearScaling, ModelSpec
from pympa.verify.reference.formulas import F64, Rounding, exactly, linear, mlp, norm, rope
from pympa.verify.reference.softmax_attention import FEW_ROWS, MOST_SCORES, attention

BLOCK_ELEMENTS = 1 << 20  # the most elements of the widest array of a block of rows

Weight = Callable[[str], F64]

Routing = Mapping[str, NDArray[Any]]
"""The expert ids by name, `layers.0.routing`: `[all tokens, top_k]`, sequence after sequence."""


def row_blocks(rows: int, width: int, parts: int = 1) -> Iterator[slice]:
    """Cut rows of a width into blocks of which `parts` have at most `BLOCK_ELEMENTS` elements.

    There are at least `parts` of them, if there are as many rows.
    """
    step = max(1, min(BLOCK_ELEMENTS // (width * parts), -(-rows // parts)))
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))


def for_row_blocks(
    rows: int, width: int, rounding: Rounding, work: Callable[[slice], None]
) -> None:
    """Call `work` for each block of rows; on all cores of this process, if nothing is rounded.

    Draws of a rounding come in order, so with one there is one thread.
    """
    cores = len(os.sched_getaffinity(0)) if rounding is exactly else 1
    if cores == 1:
        for block in row_blocks(rows, width):
            work(block)
        return
    with ThreadPoolExecutor(cores) as pool:
        for _ in pool.map(work, row_blocks(rows, width, cores)):
            pass


def once(weight: Weight) -> Weight:
    """Return a function that calls `weight` once for each name, whichever thread asks first."""
    lock, found = threading.Lock(), dict[str, F64]()

    def get(name: str) -> F64:
        with lock:
            if name not in found:
                found[name] = weight(name)
            return found[name]

    return get


def widest(layer: LayerSpec, d_model: int) -> int:
    """Return the width of the widest array of a row in a block."""
    heads = layer.heads * max(layer.head_dim, layer.value_dim)
    hidden = layer.mlp_hidden * max(layer.shared_experts, 1)
    return max(d_model, heads, hidden, layer.experts)


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
        rounding: the rounding, see the module.

    Returns:
        The branch `[len(query_rows), d_model]`.
    """
    weight, width = once(weight), widest(layer, spec.d_model)
    k = np.empty((len(x), layer.n_kv_heads, layer.head_dim))
    v = np.empty((len(x), layer.n_kv_heads, layer.value_dim))

    def make_keys(here: slice) -> None:
        normed = rounding(block_norm(layer, x[here], weight, "attention_norm"))
        positions = np.arange(here.start, here.stop)
        k[here] = _rotated(layer, normed, weight, "k", positions, rounding)
        v[here] = rounding(_projected(layer, normed, weight, "v", rounding))

    for_row_blocks(len(x), width, rounding, make_keys)
    out = np.empty((len(query_rows), spec.d_model))
    bias = weight("attention.out_bias") if layer.attention_bias else None

    def attend(here: slice) -> None:
        rows = query_rows[here]
        normed = rounding(block_norm(layer, x[rows], weight, "attention_norm"))
        o, _ = attention(
            _rotated(layer, normed, weight, "q", rows, rounding),
            k,
            v,
            rows,
            np.arange(len(x)),
            kv_head_of_q=[layer.kv_head_of(h) for h in range(layer.heads)],
            scale=1.0 / math.sqrt(layer.head_dim),
            causal=spec.causal,
            window=layer.window,
            softcap=layer.softcap,
            rounding=rounding,
        )
        o = rounding(o.reshape(len(rows), -1))
        out[here] = rounding(linear(o, weight("attention.out"), bias, rounding))

    seen = len(x) if layer.window is None else min(len(x), 2 * layer.window + FEW_ROWS)
    of_scores = seen * BLOCK_ELEMENTS // MOST_SCORES  # the scores of all threads are bounded, too
    for_row_blocks(len(query_rows), max(width, of_scores), rounding, attend)
    return out


def _projected(layer: LayerSpec, normed: F64, weight: Weight, name: str, rounding: Rounding) -> F64:
    """Return q, k or v of rows `[rows, d_model]` as `[rows, heads, dim]`."""
    heads = layer.heads if name == "q" else layer.n_kv_heads
    bias = weight(f"attention.{name}_bias") if layer.attention_bias else None
    y = linear(normed, weight(f"attention.{name}"), bias, rounding)
    return y.reshape(len(normed), heads, -1)


def _rotated(
    layer: LayerSpec,
    normed: F64,
    weight: Weight,
    name: str,
    positions: NDArray[Any],
    rounding: Rounding,
) -> F64:
    """Return q or k after its norm and RoPE."""
    x = rounding(_projected(layer, normed, weight, name, rounding))
    if layer.qk_norm != "none":
        x = rounding(norm(x, weight(f"attention.{name}_norm"), None, layer.norm_eps, "rms"))
    if layer.rope is not None:
        scaling = layer.rope.scaling
        factor = scaling.factor if isinstance(scaling, LinearScaling) else 1.0
        angles = (layer.rope.theta, layer.rotated_dim, factor)
        x = rounding(rope(x, positions, *angles))
    return x


def block_norm(layer: LayerSpec, x: F64, weight: Weight, name: str) -> F64:
    """Return the pre-norm called `name` of a block."""
    bias = weight(f"{name}.bias") if layer.norm == "layer" else None
    return norm(x, weight(f"{name}.weight"), bias, layer.norm_eps, layer.norm)


def mlp_branch(layer: LayerSpec, x: F64, weight: Weight, rounding: Rounding = exactly) -> F64:
    """Return the MLP branch before the residual, `[rows, d_model]`."""
    weight, out = once(weight), np.empty_like(x)

    def work(here: slice) -> None:
        normed = rounding(block_norm(layer, x[here], weight, "mlp_norm"))
        out[here] = _named_mlp(layer, normed, weight, "mlp", rounding)

    for_row_blocks(len(x), widest(layer, x.shape[1]), rounding, work)
    return out


def _named_mlp(layer: LayerSpec, normed: F64, weight: Weight, name: str, rounding: Rounding) -> F64:
    def bias(kind: str) -> F64 | None:
        return weight(f"{name}.{kind}_bias") if layer.mlp_bias else None

    y = mlp(
        normed,
        weight(f"{name}.up"),
        weight(f"{name}.down"),
        weight(f"{name}.gate") if layer.gated else None,
        layer.activation,
        bias("up"),
        bias("gate") if layer.gated else None,
        bias("down"),
        rounding,
    )
    return rounding(y)


def gate_logits(
    layer: LayerSpec, x: F64, weight: Weight, rounding: Rounding = exactly
) -> tuple[F64, F64]:
    """Return the logits of the experts, and their sensitivity to an error of the gate's input.

    Args:
        layer: the block.
        x: the residual stream `[rows, d_model]`.
        weight: a function from a name inside the block to a float64 array.
        rounding: the rounding, see the module.

    Returns:
        The logits `[rows, experts]`, and `[rows]` the deviation of a logit if the whole input had
        an error of its own size in a random direction, |input| |router row| / sqrt(d_model).
    """
    weight, router = once(weight), weight("router")
    bias = weight("router_bias") if layer.router_skew else None
    logits, sensitivity = np.empty((len(x), layer.experts)), np.empty(len(x))
    for here in row_blocks(len(x), widest(layer, x.shape[1])):
        normed = rounding(block_norm(layer, x[here], weight, "mlp_norm"))
        logits[here] = linear(normed, router, bias, rounding)
        sensitivity[here] = np.sqrt((normed**2).sum(axis=1) * (router**2).mean())
    return logits, sensitivity


def largest(logits: F64, top_k: int) -> NDArray[np.int64]:
    """Return the ids of the `top_k` largest logits in each row, ascending; ties: the lower id."""
    chosen = np.empty((len(logits), top_k), np.int64)
    for here in row_blocks(*logits.shape):
        order = np.argsort(-logits[here], axis=1, kind="stable")
        chosen[here] = np.sort(order[:, :top_k], axis=1)
    return chosen


def kept(layer: LayerSpec, chosen: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which choices of one whole sequence are within the experts' capacity.

    Args:
        layer: the block.
        chosen: the expert ids `[tokens, top_k]`.
    """
    keep = np.ones(chosen.shape, bool)
    group = layer.capacity_group
    if group is None:
        return keep
    for start in range(0, len(chosen), group):
        rows = chosen[start : start + group]
        room = [layer.capacity(len(rows))] * layer.experts
        for row, experts in enumerate(rows.tolist()):
            for k, expert in enumerate(experts):
                keep[start + row, k] = room[expert] > 0
                room[expert] -= 1
    return keep


def moe_branch(
    layer: LayerSpec,
    x: F64,
    weight: Weight,
    chosen: NDArray[Any],
    keep: NDArray[np.bool_],
    rounding: Rounding = exactly,
) -> F64:
    """Return the expert branch before the residual, `[rows, d_model]`.

    Args:
        layer: the block.
        x: the residual stream `[rows, d_model]`.
        weight: a function from a name inside the block to a float64 array.
        chosen: the expert ids of each row `[rows, top_k]`.
        keep: the mask of the choices that are not dropped, bool `[rows, top_k]`.
        rounding: the rounding, see the module.
    """
    exponents, _ = gate_logits(layer, x, weight, rounding)
    exponents -= exponents.max(axis=1, keepdims=True)
    np.exp(exponents, out=exponents)
    shares = np.take_along_axis(exponents, chosen, axis=1)
    shares /= (shares if layer.renormalize else exponents).sum(axis=1, keepdims=True)
    out = np.zeros_like(x)

    def add(name: str, rows: NDArray[Any], share: F64) -> None:
        own = once(weight)

        def work(here: slice) -> None:
            normed = rounding(block_norm(layer, x[rows[here]], own, "mlp_norm"))
            out[rows[here]] += share[here, None] * _named_mlp(layer, normed, own, name, rounding)

        for_row_blocks(len(rows), widest(layer, x.shape[1]), rounding, work)

    for expert in np.unique(chosen[keep]):
        rows, k = np.nonzero((chosen == expert) & keep)
        add(f"experts.{expert}", rows, shares[rows, k])
    if layer.shared_experts:
        add("shared", np.arange(len(x)), np.ones(len(x)))
    return rounding(out)


def forward(
    spec: ModelSpec,
    weight: Weight,
    sequences: Sequence[NDArray[Any]],
    routing: Routing | None = None,
    rounding: Rounding = exactly,
) -> tuple[dict[str, F64], F64]:
    """Run the whole model on whole sequences.

    Args:
        spec: the model.
        weight: a function from a global name to a float64 array; called once for each use of a
            name.
        sequences: the token ids of each sequence.
        routing: the experts to use where rounding may decide; None means those of largest logits.
        rounding: the rounding, see the module.

    Returns:
        The branch outputs by name (`layers.0.attention`, `layers.0.mlp`, ..., and `output`, the
        residual stream after the last block), each `[all tokens, d_model]`, one sequence after the
        other; for a layer with experts also `layers.0.routing`, the gate logits over their
        sensitivity `[all tokens, experts]`; and the logits of each sequence's last token
        `[sequences, vocabulary]`.
    """
    ends = np.cumsum([0, *(len(ids) for ids in sequences)])
    spans = [slice(a, b) for a, b in itertools.pairwise(ends.tolist())]
    stream = weight("embedding")[np.concatenate(sequences)]
    outputs: dict[str, F64] = {}
    for index, layer in enumerate(spec.blocks):
        block = functools.partial(_in_block, weight, index)
        kept_block = functools.cache(block)  # for all sequences
        branch = np.empty_like(stream)
        for here in spans:
            rows = np.arange(here.stop - here.start)
            branch[here] = attention_branch(spec, layer, stream[here], kept_block, rows, rounding)
        del kept_block
        outputs[f"layers.{index}.attention"] = branch
        stream = rounding(np.add(stream, branch, out=stream))
        if layer.experts:
            name = f"layers.{index}.routing"
            gates, scale = gate_logits(layer, stream, block, rounding)
            chosen = largest(gates, layer.top_k) if routing is None else routing[name]
            gates /= scale[:, None]
            outputs[name] = gates
            keep = np.concatenate([kept(layer, chosen[here]) for here in spans])
            branch = moe_branch(layer, stream, block, chosen, keep, rounding)
        else:
            branch = mlp_branch(layer, stream, block, rounding)
        outputs[f"layers.{index}.mlp"] = branch
        stream = rounding(np.add(stream, branch, out=stream))
    outputs["output"] = stream
    last = [here.stop - 1 for here in spans if here.stop > here.start]
    return outputs, logits(spec, weight, stream[last], rounding)


def logits(spec: ModelSpec, weight: Weight, rows: F64, rounding: Rounding = exactly) -> F64:
    """Return the logits of rows of the residual stream: the final norm, then the head."""
    normed = block_norm(spec.blocks[-1], rows.reshape(-1, spec.d_model), weight, "final_norm")
    head = weight("embedding" if spec.tied_head else "head")
    return linear(rounding(normed), head, None, rounding)


def _in_block(weight: Weight, index: int, name: str) -> F64:
    return weight(f"layers.{index}.{name}")
