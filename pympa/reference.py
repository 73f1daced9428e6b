"""The oracle: a transformer in float64 NumPy, by the plain formulas.

It shares no code with the kernels, the strategies or the model, so that a mistake there cannot
hide here. It is given the same rounded weights and computes everything else exactly (to float64).
Sources: Vaswani et al. 2017 (attention), Su et al. 2021 (RoPE), Zhang & Sennrich 2019 (RMSNorm),
Hendrycks & Gimpel 2016 (GELU), Shazeer 2020 (gated MLP), Lepikhin et al. 2020 (experts).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.spec import LayerSpec, ModelSpec

F64 = NDArray[np.float64]
_erf = np.vectorize(math.erf, otypes=[np.float64])


def activate(x: F64, kind: str) -> F64:
    """Apply "none", "gelu" (erf), "gelu_tanh" or "silu" to `x` of any shape."""
    if kind == "none":
        return x
    if kind == "gelu":
        return 0.5 * x * (1.0 + np.asarray(_erf(x / math.sqrt(2.0)), np.float64))
    if kind == "gelu_tanh":
        return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    if kind == "silu":
        return x * 0.5 * (1.0 + np.tanh(0.5 * x))  # x * sigmoid(x) without overflow
    raise ValueError(f"activation: expected none, gelu, gelu_tanh or silu; got {kind!r}")


def linear(x: F64, weight: F64, bias: F64 | None = None) -> F64:
    """Return x @ weight.T + bias for x `[rows, k]`, weight `[n, k]`."""
    y = x @ weight.T
    return y if bias is None else y + bias


def norm(x: F64, weight: F64, bias: F64 | None, eps: float, kind: str) -> F64:
    """Normalise the last axis of `x`: "rms" or "layer"."""
    if kind == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    y: F64 = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight
    return y if bias is None else y + bias


def rope(x: F64, positions: NDArray[Any], theta: float, rotated: int, factor: float) -> F64:
    """Rotate the first `rotated` dims of x `[rows, heads, head_dim]` by its rows' positions."""
    half = rotated // 2
    frequency = theta ** (-np.arange(half, dtype=np.float64) * 2.0 / rotated)
    angle = (np.asarray(positions, np.float64) / factor)[:, None, None] * frequency
    first, second, rest = x[..., :half], x[..., half:rotated], x[..., rotated:]
    turned_first = first * np.cos(angle) - second * np.sin(angle)
    turned_second = second * np.cos(angle) + first * np.sin(angle)
    return np.concatenate([turned_first, turned_second, rest], axis=-1)


def attention(
    q: F64,
    k: F64,
    v: F64,
    q_positions: NDArray[Any],
    k_positions: NDArray[Any],
    *,
    kv_head_of_q: list[int],
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[F64, F64]:
    """Return softmax attention of one sequence, and its log-sum-exp.

    Args:
        q: `[rows, heads, head_dim]`.
        k: `[keys, kv_heads, head_dim]`.
        v: `[keys, kv_heads, v_head_dim]`.
        q_positions: position of each query row in the sequence.
        k_positions: position of each key.
        kv_head_of_q: kv head of each query head.
        scale: factor on q·k.
        causal: hide keys after the query.
        window: hide keys `window` or more positions away; None hides none.
        softcap: cap on scores; None means none.

    Returns:
        o `[rows, heads, dv]` and lse `[rows, heads]`; a row that sees no key gives 0 and -inf.
    """
    o = np.zeros((q.shape[0], q.shape[1], v.shape[2]))
    lse = np.full(q.shape[:2], -np.inf)
    distance = np.asarray(q_positions)[:, None] - np.asarray(k_positions)[None, :]
    hidden = np.zeros(distance.shape, bool)
    if causal:
        hidden |= distance < 0
    if window is not None:
        hidden |= np.abs(distance) >= window
    sees = ~hidden.all(axis=1)
    if not sees.any():
        return o, lse
    for head, kv_head in enumerate(kv_head_of_q):
        scores = q[:, head] @ k[:, kv_head].T * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        scores[hidden] = -np.inf
        scores = scores[sees]
        top = scores.max(axis=1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(axis=1, keepdims=True)
        o[sees, head] = weights @ v[:, kv_head] / total
        lse[sees, head] = (top + np.log(total))[:, 0]
    return o, lse


def mlp(
    x: F64,
    up: F64,
    down: F64,
    gate: F64 | None,
    activation: str,
    up_bias: F64 | None = None,
    gate_bias: F64 | None = None,
    down_bias: F64 | None = None,
) -> F64:
    """Return the plain MLP act(x up) down, or the gated one (act(x gate) * (x up)) down."""
    hidden = linear(x, up, up_bias)
    if gate is None:
        hidden = activate(hidden, activation)
    else:
        hidden *= activate(linear(x, gate, gate_bias), activation)
    return linear(hidden, down, down_bias)


Weight = Callable[[str], F64]


def attention_branch(
    spec: ModelSpec, layer: LayerSpec, x: F64, weight: Weight, query_rows: NDArray[Any]
) -> F64:
    """Return the attention branch of one sequence for some of its rows, before the residual.

    Args:
        spec: the model.
        layer: the block.
        x: residual stream of the whole sequence `[tokens, d_model]`.
        weight: name inside the block -> float64 array.
        query_rows: positions whose output is wanted.

    Returns:
        `[len(query_rows), d_model]`.
    """

    def project(rows: F64, name: str, heads: int, dim: int) -> F64:
        bias = weight(f"attention.{name}_bias") if layer.attention_bias else None
        return linear(rows, weight(f"attention.{name}"), bias).reshape(-1, heads, dim)

    positions = np.arange(x.shape[0])
    normed = block_norm(layer, x, weight, "attention_norm")
    q = project(normed[query_rows], "q", layer.heads, layer.head_dim)
    k = project(normed, "k", layer.n_kv_heads, layer.head_dim)
    v = project(normed, "v", layer.n_kv_heads, layer.value_dim)
    if layer.qk_norm:
        q = norm(q, weight("attention.q_norm"), None, layer.norm_eps, "rms")
        k = norm(k, weight("attention.k_norm"), None, layer.norm_eps, "rms")
    if layer.rope is not None:
        turn = (layer.rope.theta, layer.rotated_dim, layer.rope.scaling_factor)
        q, k = rope(q, query_rows, *turn), rope(k, positions, *turn)
    o, _ = attention(
        q,
        k,
        v,
        query_rows,
        positions,
        kv_head_of_q=[layer.kv_head_of(h) for h in range(layer.heads)],
        scale=1.0 / math.sqrt(layer.head_dim),
        causal=spec.causal,
        window=layer.window,
        softcap=layer.softcap,
    )
    bias = weight("attention.out_bias") if layer.attention_bias else None
    return linear(o.reshape(len(query_rows), -1), weight("attention.out"), bias)


def block_norm(layer: LayerSpec, x: F64, weight: Weight, name: str) -> F64:
    """Return the pre-norm called `name` of a block."""
    bias = weight(f"{name}.bias") if layer.norm == "layer" else None
    return norm(x, weight(f"{name}.weight"), bias, layer.norm_eps, layer.norm)


def mlp_branch(layer: LayerSpec, x: F64, weight: Weight) -> F64:
    """Return the MLP branch before the residual, `[rows, d_model]`."""
    return _named_mlp(layer, block_norm(layer, x, weight, "mlp_norm"), weight, "mlp")


def _named_mlp(layer: LayerSpec, normed: F64, weight: Weight, name: str) -> F64:
    def bias(kind: str) -> F64 | None:
        return weight(f"{name}.{kind}_bias") if layer.mlp_bias else None

    return mlp(
        normed,
        weight(f"{name}.up"),
        weight(f"{name}.down"),
        weight(f"{name}.gate") if layer.gated else None,
        layer.activation,
        bias("up"),
        bias("gate") if layer.gated else None,
        bias("down"),
    )


def gate_logits(layer: LayerSpec, x: F64, weight: Weight) -> tuple[F64, F64]:
    """Return the logits of the experts, and how far an error of the gate's input moves them.

    Args:
        layer: the block.
        x: residual stream `[rows, d_model]`.
        weight: name inside the block -> float64 array.

    Returns:
        logits `[rows, experts]`, and `[rows]`: the deviation of a logit if the whole input were
        off by its own size in a random direction, |input| |router row| / sqrt(d_model).
    """
    normed, router = block_norm(layer, x, weight, "mlp_norm"), weight("router")
    bias = weight("router_bias") if layer.router_skew else None
    sensitivity = np.sqrt((normed**2).sum(axis=1) * (router**2).mean())
    return linear(normed, router, bias), sensitivity


def largest(logits: F64, top_k: int) -> NDArray[np.int64]:
    """Return the ids of the `top_k` largest logits of each row, ascending; ties to the lower id."""
    return np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :top_k], axis=1)


def kept(layer: LayerSpec, chosen: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which choices of one whole sequence are within the experts' capacity.

    Args:
        layer: the block.
        chosen: expert ids `[tokens, top_k]`.
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
    layer: LayerSpec, x: F64, weight: Weight, chosen: NDArray[Any], keep: NDArray[np.bool_]
) -> F64:
    """Return the expert branch before the residual, `[rows, d_model]`.

    Args:
        layer: the block.
        x: residual stream `[rows, d_model]`.
        weight: name inside the block -> float64 array.
        chosen: expert ids of each row `[rows, top_k]`.
        keep: which of them are not dropped.
    """
    normed = block_norm(layer, x, weight, "mlp_norm")
    logits, _ = gate_logits(layer, x, weight)
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = np.take_along_axis(exponents, chosen, axis=1)
    shares /= (shares if layer.renormalize else exponents).sum(axis=1, keepdims=True)
    out = np.zeros_like(x)
    for expert in np.unique(chosen[keep]):
        rows, k = np.nonzero((chosen == expert) & keep)
        y = _named_mlp(layer, normed[rows], weight, f"experts.{expert}")
        out[rows] += shares[rows, k][:, None] * y
    if layer.shared_experts:
        out += _named_mlp(layer, normed, weight, "shared")
    return out


_ROWS_AT_ONCE = 1024  # bounds the score matrix of one head


Routing = Mapping[str, NDArray[Any]]
"""Expert ids by name, `layers.0.routing`: `[all tokens, top_k]`, sequences end to end."""


def forward(
    spec: ModelSpec,
    weight: Weight,
    sequences: Sequence[NDArray[Any]],
    routing: Routing | None = None,
) -> tuple[dict[str, F64], F64]:
    """Run the whole model on whole sequences.

    Args:
        spec: the model.
        weight: global name -> float64 array; asked for each name once a layer.
        sequences: token ids of each sequence.
        routing: experts to take where rounding may decide; None means those of largest logits.

    Returns:
        Branch outputs by name (`layers.0.attention`, `layers.0.mlp`, ..., `output` = the residual
        stream after the last block), each `[all tokens, d_model]` with sequences end to end; for a
        layer with experts also `layers.0.routing`, the gate logits over their sensitivity
        `[all tokens, experts]`; and the logits of each sequence's last token
        `[sequences, vocabulary]`.
    """
    ends = np.cumsum([len(ids) for ids in sequences])[:-1]
    outputs: dict[str, F64] = {}
    embedding = weight("embedding")
    streams = [embedding[ids] for ids in sequences]
    for index, layer in enumerate(spec.blocks):
        block = functools.cache(functools.partial(_in_block, weight, index))
        branches = [whole_attention_branch(spec, layer, x, block) for x in streams]
        streams = [x + branch for x, branch in zip(streams, branches, strict=True)]
        outputs[f"layers.{index}.attention"] = np.concatenate(branches)
        if layer.experts:
            name = f"layers.{index}.routing"
            gates = [gate_logits(layer, x, block) for x in streams]
            outputs[name] = np.concatenate([a / scale[:, None] for a, scale in gates])
            chosen = (
                [largest(a, layer.top_k) for a, _ in gates]
                if routing is None
                else np.split(routing[name], ends)
            )
            branches = [
                moe_branch(layer, x, block, ids, kept(layer, ids))
                for x, ids in zip(streams, chosen, strict=True)
            ]
        else:
            branches = [mlp_branch(layer, x, block) for x in streams]
        streams = [x + branch for x, branch in zip(streams, branches, strict=True)]
        outputs[f"layers.{index}.mlp"] = np.concatenate(branches)
    outputs["output"] = np.concatenate(streams)
    return outputs, logits(spec, weight, np.array([x[-1] for x in streams if len(x)]))


def logits(spec: ModelSpec, weight: Weight, rows: F64) -> F64:
    """Return the final norm and the head of some rows of the residual stream."""
    normed = block_norm(spec.blocks[-1], rows.reshape(-1, spec.d_model), weight, "final_norm")
    return linear(normed, weight("embedding" if spec.tied_head else "head"))


def whole_attention_branch(spec: ModelSpec, layer: LayerSpec, x: F64, weight: Weight) -> F64:
    """Return `attention_branch` of every row."""
    rows = np.arange(len(x))
    parts = [
        attention_branch(spec, layer, x, weight, rows[at : at + _ROWS_AT_ONCE])
        for at in range(0, len(x), _ROWS_AT_ONCE)
    ]
    return np.concatenate([np.empty((0, spec.d_model)), *parts])


def _in_block(weight: Weight, index: int, name: str) -> F64:
    return weight(f"layers.{index}.{name}")
