"""The whole model, by the formulas.

`rounding` makes the oracle emulate a run: exact except for rounding to a dtype and float32 sums, at
the points where every run has them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.spec import ModelSpec
from pympa.verify.reference.attention_branch import attention_branch
from pympa.verify.reference.experts import choose, gate_values, kept, mlp_branch, moe_branch
from pympa.verify.reference.formulas import F64, Rounding, exactly, linear
from pympa.verify.reference.rows import Weight, block_norm

EXACT = np.dtype(np.float64)
Routing = Mapping[str, NDArray[Any]]
"""The expert ids by name, `layers.0.routing`: `[all tokens, top_k]`, sequence after sequence."""


def forward(
    spec: ModelSpec,
    weight: Weight,
    sequences: Sequence[NDArray[Any]],
    routing: Routing | None = None,
    rounding: Rounding = exactly,
    *,
    dtype: np.dtype[Any] = EXACT,
    all_logits: bool = False,
) -> tuple[dict[str, F64], F64]:
    """Run the whole model on whole sequences.

    Args:
        spec: the model.
        weight: a function from a global name to a float64 array; called once for each use of a
            name.
        sequences: the token ids of each sequence.
        routing: the experts to use where rounding may decide; None means those of largest values.
        rounding: the rounding, see the module.
        dtype: the dtype of the run, to which the scale of embeddings is rounded.
        all_logits: whether logits of all tokens are returned, instead of the last ones.

    Returns:
        The branch outputs by name (`layers.0.attention`, `layers.0.mlp`, ..., and `output`, the
        residual stream after the last block), each `[all tokens, d_model]`, one sequence after the
        other; for a layer with experts also `layers.0.routing`, the values by which experts are
        chosen over their sensitivity `[all tokens, experts]`; and the logits of each sequence's
        last token `[sequences, vocabulary]`.
    """
    ends = np.cumsum([0, *(len(ids) for ids in sequences)])
    spans = [slice(a, b) for a, b in itertools.pairwise(ends.tolist())]
    spec = spec.within(max(map(len, sequences)))
    stream = embed(spec, weight, np.concatenate(sequences), dtype, rounding)
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
        before = stream if layer.parallel else None  # otherwise it need not stay
        stream = rounding(stream + branch)
        read = stream if before is None else before
        if layer.experts:
            name = f"layers.{index}.routing"
            values, scale = gate_values(layer, read, block, rounding)
            chosen = choose(layer, values) if routing is None else routing[name]
            values /= scale[:, None]
            outputs[name] = values
            keep = np.concatenate([kept(layer, chosen[here]) for here in spans])
            branch = moe_branch(layer, read, block, chosen, keep, rounding)
        else:
            branch = mlp_branch(layer, read, block, rounding)
        del before, read
        outputs[f"layers.{index}.mlp"] = branch
        stream = rounding(np.add(stream, branch, out=stream))
    outputs["output"] = stream
    last = [here.stop - 1 for here in spans if here.stop > here.start]
    return outputs, logits(spec, weight, stream if all_logits else stream[last], rounding)


def embed(
    spec: ModelSpec,
    weight: Weight,
    ids: NDArray[Any],
    dtype: np.dtype[Any] = EXACT,
    rounding: Rounding = exactly,
) -> F64:
    """Return the embeddings of tokens, `[tokens, d_model]`."""
    scale = float(np.asarray(spec.embedding_scale).astype(dtype))
    rows = weight("embedding")[ids]
    return rows if scale == 1.0 else rounding(rows * scale)


def logits(spec: ModelSpec, weight: Weight, rows: F64, rounding: Rounding = exactly) -> F64:
    """Return the logits of rows of the residual stream: the final norm, then the head."""
    normed = block_norm(spec.blocks[-1], rows.reshape(-1, spec.d_model), weight, "final_norm")
    head = weight("embedding" if spec.tied_head else "head")
    y = linear(rounding(normed), head, None, rounding)
    cap = spec.logit_softcap
    return y if cap is None else cap * np.tanh(y / cap)


def _in_block(weight: Weight, index: int, name: str) -> F64:
    return weight(f"layers.{index}.{name}")
