"""The cost of checking a run on rank 0: time and memory of the oracle, and the outputs compared.

Bytes are those of all arrays that the oracle, the verdict and the collected outputs hold at the
same time, rounded up a little; a test compares them with Python's own count.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from pympa.model.weights import model_weights
from pympa.plan.accounting import step_flops
from pympa.spec import LayerSpec, ModelSpec
from pympa.verify.reference.rows import BLOCK_ELEMENTS, widest
from pympa.verify.reference.softmax_attention import MOST_SCORES
from pympa.verify.verdict import MOST_DRAWS

_F64, _F32 = 8, 4
_BLOCKS = 8  # arrays of a block of rows at once: normed, q, its rotated halves, hidden, its square
_SCORE_BYTES = 8 + 8 + 4 + 3  # a score, the distance of its positions, its float32, its mask
_MAKING_BYTES = 48 << 20  # a chunk of a weight while it is generated, and the erf of a chunk
_SCORE_FLOPS, _ELEMENT_FLOPS = 300, 1000
"""Multiply-adds in the time of a score's exp and sum, or of an activation, on one core."""


def whole_flops(spec: ModelSpec, lengths: Sequence[int]) -> float:
    """Return the flops of a step, plus those that take as long as its other operations."""
    tokens, more = sum(lengths), 0.0
    for layer in spec.blocks:
        pairs = sum(n * min(n, layer.window or n) for n in lengths)
        hidden = layer.mlp_hidden * (layer.top_k or 1) + layer.shared_width
        more += _SCORE_FLOPS * layer.heads * pairs / (2 if spec.causal else 1)
        more += _ELEMENT_FLOPS * tokens * (hidden + layer.heads * layer.head_dim)
    return step_flops(spec, lengths) + more


def output_bytes(spec: ModelSpec, tokens: int, itemsize: int) -> int:
    """Return the bytes of all branches of a run, or of the oracle, and of the chosen experts.

    Args:
        spec: the model.
        tokens: the number of tokens whose outputs are kept.
        itemsize: the bytes of one element of a branch.
    """
    branches = (2 * len(spec.blocks) + 1) * spec.d_model * itemsize
    choices = sum(
        layer.experts * _F64 if itemsize == _F64 else layer.top_k * 4
        for layer in spec.blocks
        if layer.experts
    )
    return tokens * (branches + choices)


def compare_bytes(spec: ModelSpec, tokens: int, sequences: int) -> int:
    """Return the bytes of an output's rows, differences and squares, and of all rows' errors.

    Errors are kept for a run, for the run on one rank, and for emulations of rounding.
    """
    widest_output = max(spec.d_model, *(layer.experts for layer in spec.blocks))
    errors = (2 * 2 + 3 * MOST_DRAWS) * (2 * len(spec.blocks) + 1) * tokens
    return _F64 * (4 * max(tokens * widest_output, sequences * spec.vocabulary) + errors)


def whole_bytes(spec: ModelSpec, lengths: Sequence[int], itemsize: int) -> int:
    """Return the most bytes that `verify.oracle` holds, including its outputs.

    Args:
        spec: the model.
        lengths: the number of tokens of each sequence.
        itemsize: the bytes of one element of a weight before it is float64.
    """
    tokens, longest = sum(lengths), max(lengths)
    sizes, largest = _weight_elements(spec)
    row = _F64 * tokens * spec.d_model
    kept = row  # the residual stream
    most = _F64 * sizes["embedding"] + kept
    for index, layer in enumerate(spec.blocks):
        attention = _attention_bytes(spec, layer, sizes[f"{index}.attention"], longest)
        most = max(most, kept + row + attention)
        kept += row
        mlp = row * (2 if layer.parallel else 1) + _F64 * sizes[f"{index}.mlp"]
        if layer.experts:
            kept += _F64 * tokens * layer.experts
            mlp += tokens * (2 * _F64 * layer.experts + 6 * _F64 * layer.top_k)
        most = max(most, kept + mlp)
        kept += row
    last = len(lengths) * spec.vocabulary + sizes["head"]
    return max(most, kept + _F64 * last) + _scratch_bytes(
        spec, longest, tokens, largest * max(itemsize, _F32)
    )


def sampled_bytes(spec: ModelSpec, tokens: int, itemsize: int) -> int:
    """Return the most bytes that `verify.compare_sampled` holds, without the run's outputs.

    Args:
        spec: the model.
        tokens: the number of tokens of the sequence that is checked.
        itemsize: the bytes of one element of the run.
    """
    sizes, largest = _weight_elements(spec)
    row = tokens * spec.d_model
    stream = row * (itemsize + _F64)
    most = stream + max(_F64 * sizes["embedding"], 12 * row)  # sums of the stream are float32
    for index, layer in enumerate(spec.blocks):
        attention = _attention_bytes(spec, layer, sizes[f"{index}.attention"], tokens)
        mlp = _F64 * sizes[f"{index}.mlp"] + 6 * tokens * layer.top_k
        most = max(most, stream + attention, stream + mlp)
    most = max(most, stream + _F64 * sizes["head"])
    return most + _scratch_bytes(spec, tokens, tokens, largest * max(itemsize, _F32))


def largest_weight(spec: ModelSpec) -> int:
    """Return the number of elements of the largest weight."""
    return _weight_elements(spec)[1]


def _attention_bytes(spec: ModelSpec, layer: LayerSpec, elements: int, longest: int) -> int:
    """Return the bytes of a layer's attention weights, and of k, v and the branch of a sequence."""
    row = layer.n_kv_heads * (layer.head_dim + layer.value_dim) + spec.d_model + 1
    return _F64 * (elements + longest * row)


def _scratch_bytes(spec: ModelSpec, longest: int, tokens: int, making: int) -> int:
    """Return the bytes of temporary arrays: a weight in another dtype, rows and scores."""
    width = max(widest(layer, spec.d_model) for layer in spec.blocks)
    block = min(max(BLOCK_ELEMENTS, width), tokens * width)
    scores = min(longest * longest, max(MOST_SCORES, longest))
    return making + _MAKING_BYTES + _F64 * _BLOCKS * block + _SCORE_BYTES * scores


def _weight_elements(spec: ModelSpec) -> tuple[Mapping[str, int], int]:
    """Return the elements of weights that are float64 at once, by use, and of the largest weight.

    For a layer these are the weights of attention, and of its MLP or of one of its experts.
    """
    found: defaultdict[str, int] = defaultdict(int)
    largest = 0
    for name, weight in model_weights(spec).items():
        count = math.prod(weight.shape)
        largest = max(largest, count)
        _, _, local = name.partition("layers.")
        index, _, local = local.partition(".")
        if not index:
            found[name] += count
        elif local.startswith("attention"):
            found[f"{index}.attention"] += count
        elif not local.startswith("experts.") or local.startswith("experts.0."):
            found[f"{index}.mlp"] += count
    if spec.tied_head:
        found["head"] = found["embedding"]
    return found, largest
