"""Weights and input bytes that every plan on every backend makes bit for bit alike.

An element depends on its tensor's name and its *global* index only: Philox-4x64 (Salmon et al.
2011) keyed by the name, counted by the index, gives 32 random bits; the value is those bits as an
integer, scaled in float64 and rounded once to the dtype. No libm is involved and a rank makes
only its shard.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.layout import Span
from pympa.spec import LayerSpec, ModelSpec, NormKind

_PER_COUNTER = 8  # one Philox counter gives four 64-bit words = eight 32-bit elements
_CHUNK_ELEMENTS = 1 << 20  # bounds the float64 scratch of a fill to 8 MB
_STREAM_ELEMENTS = 6144  # take as long as the start of a stream at some index
SCORE_STD = 2.0  # attention must matter: q·k/sqrt(head_dim) has about this deviation


@dataclass(frozen=True)
class WeightSpec:
    """What a tensor of the model looks like before any splitting.

    Attributes:
        name: global name; keys the random stream.
        shape: global shape, `[n]` or `[rows, cols]`.
        bound: elements are uniform in offset ± bound.
        offset: centre of the distribution. slope: added to it for each element before.
    """

    name: str
    shape: tuple[int, ...]
    bound: float
    offset: float = 0.0
    slope: float = 0.0


def uniform_bound(std: float) -> float:
    """Return the half-width of a uniform distribution with deviation `std`."""
    return std * math.sqrt(3.0)


def model_weights(spec: ModelSpec) -> dict[str, WeightSpec]:
    """Return every tensor of a model by name; a linear weight is `[outputs, inputs]`.

    Deviations keep activations near 1; q and k are larger, so that scores have `SCORE_STD`.
    """
    found: dict[str, WeightSpec] = {}
    d_model = spec.d_model

    def matrix(name: str, outputs: int, inputs: int, bias: bool = False, gain: float = 1.0) -> None:
        found[name] = WeightSpec(name, (outputs, inputs), uniform_bound(gain / math.sqrt(inputs)))
        if bias:
            found[name + "_bias"] = WeightSpec(name + "_bias", (outputs,), 0.1)

    def norm(name: str, kind: NormKind) -> None:
        found[name + ".weight"] = WeightSpec(name + ".weight", (d_model,), 0.25, 1.0)
        if kind == "layer":
            found[name + ".bias"] = WeightSpec(name + ".bias", (d_model,), 0.1)

    def mlp(at: str, layer: LayerSpec, hidden: int) -> None:
        for name in ("gate", "up") if layer.gated else ("up",):
            matrix(at + name, hidden, d_model, layer.mlp_bias)
        matrix(at + "down", d_model, hidden, layer.mlp_bias)

    gain = math.sqrt(SCORE_STD)
    found["embedding"] = WeightSpec("embedding", (spec.vocabulary, d_model), uniform_bound(1.0))
    for index, layer in enumerate(spec.blocks):
        at = f"layers.{index}."
        qk_gain = 1.0 if layer.qk_norm else gain
        norm(at + "attention_norm", layer.norm)
        bias = layer.attention_bias
        matrix(at + "attention.q", layer.heads * layer.head_dim, d_model, bias, qk_gain)
        matrix(at + "attention.k", layer.n_kv_heads * layer.head_dim, d_model, bias, qk_gain)
        matrix(at + "attention.v", layer.n_kv_heads * layer.value_dim, d_model, bias)
        matrix(at + "attention.out", d_model, layer.heads * layer.value_dim, bias)
        if layer.qk_norm:
            for name in (at + "attention.q_norm", at + "attention.k_norm"):
                found[name] = WeightSpec(name, (layer.head_dim,), 0.25 * gain, gain)
        norm(at + "mlp_norm", layer.norm)
        if not layer.experts:
            mlp(at + "mlp.", layer, layer.mlp_hidden)
            continue
        matrix(at + "router", layer.experts, d_model)
        if layer.router_skew:
            slope, name = -layer.router_skew / (layer.experts - 1), at + "router_bias"
            found[name] = WeightSpec(name, (layer.experts,), 0.0, slope=slope)
        for expert in range(layer.experts):
            mlp(f"{at}experts.{expert}.", layer, layer.mlp_hidden)
        if layer.shared_experts:
            mlp(at + "shared.", layer, layer.shared_experts * layer.mlp_hidden)
    norm("final_norm", spec.blocks[-1].norm)
    if not spec.tied_head:
        matrix("head", spec.vocabulary, d_model)
    return found


class PhiloxSource:
    """Random weights, made on the host.

    Args:
        seed: another seed is another model.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def fill(
        self,
        spec: WeightSpec,
        out: NDArray[Any],
        rows: Sequence[Span] | None = None,
        cols: Sequence[Span] | None = None,
    ) -> None:
        """Fill `out` with `spec`'s elements [rows, cols]; None means all.

        Args:
            spec: the tensor.
            out: `[rows, cols]` (or `[rows]`) of the wanted dtype, rounded to nearest even.
            rows: spans of the first axis, one after the other.
            cols: spans of the second axis, in ascending order.
        """
        width = spec.shape[1] if len(spec.shape) == 2 else 1
        at = 0
        for first, last in rows or [(0, spec.shape[0])]:
            part = out[at : at + last - first]
            at += last - first
            if cols is None:
                self._fill_rows(spec, part.reshape(-1), first * width)
            elif cols:
                self._fill_columns(spec, part, first * width, cols)

    def _fill_rows(self, spec: WeightSpec, flat: NDArray[Any], start: int) -> None:
        for at in range(0, flat.size, _CHUNK_ELEMENTS):
            part = flat[at : at + _CHUNK_ELEMENTS]
            part[:] = self._values(spec, start + at, part.size)

    def _fill_columns(
        self, spec: WeightSpec, out: NDArray[Any], start: int, cols: Sequence[Span]
    ) -> None:
        width, first, last = spec.shape[1], cols[0][0], cols[-1][1]
        rows = _CHUNK_ELEMENTS // width
        if width - (last - first) > _STREAM_ELEMENTS or rows == 0:
            rows = 1  # of which only what is wanted is made
        else:
            first, last = 0, width
        for at in range(0, len(out), rows):
            part = out[at : at + rows]
            begin, count = start + at * width + first, (len(part) - 1) * width + last - first
            values = self._values(spec, begin, count).reshape(len(part), -1)
            to = 0
            for one, end in cols:
                part[:, to : to + end - one] = values[:, one - first : end - first]
                to += end - one

    def full(self, spec: WeightSpec, dtype: np.dtype[Any]) -> NDArray[np.float64]:
        """Return the whole tensor, rounded to `dtype`, as float64: what the oracle computes on."""
        out = np.empty(spec.shape, dtype)
        self.fill(spec, out)
        return out.astype(np.float64)

    def _values(self, spec: WeightSpec, start: int, count: int) -> NDArray[np.float64]:
        bits = philox_bits(f"{self.seed}/{spec.name}", start, count)
        values = (bits.astype(np.float64) - 2147483647.5) * (
            spec.bound / 2147483648.0
        ) + spec.offset
        return values + spec.slope * np.arange(start, start + count) if spec.slope else values


def philox_bits(name: str, start: int, count: int) -> NDArray[np.uint32]:
    """Return elements start..start+count of the 32-bit stream keyed by `name`."""
    counter, skip = divmod(start, _PER_COUNTER)
    words = -(-(skip + count) // _PER_COUNTER) * 4
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key, counter=counter).random_raw(words)
    return raw.astype("<u8", copy=False).view("<u4")[skip : skip + count]


def input_ids(text: bytes, tokens: int) -> NDArray[np.int32]:
    """Return `tokens` byte values of a text; each repeat of it is permuted, never verbatim.

    Raises:
        ValueError: the text is empty.
    """
    if not text:
        raise ValueError("input: expected at least one byte of text; got an empty file")
    once = np.frombuffer(text, np.uint8).astype(np.int32)
    parts = [once]
    for repeat in range(1, -(-tokens // len(once))):
        order = np.argsort(philox_bits(f"input/{repeat}", 0, len(once)), kind="stable")
        parts.append(once[order])
    return np.concatenate(parts)[:tokens]
