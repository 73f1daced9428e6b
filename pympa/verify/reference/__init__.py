"""The oracle: a transformer in float64 NumPy, by the plain formulas.

It shares no code with the kernels, the strategies or the model, so a mistake there cannot be
repeated here. It gets the same rounded weights and computes everything else exactly (in float64).
Sources: Vaswani et al. 2017 (attention), Su et al. 2021 (RoPE), Zhang & Sennrich 2019 (RMSNorm),
Hendrycks & Gimpel 2016 (GELU), Shazeer 2020 (gated MLP), Lepikhin et al. 2020 (experts).

Rows are computed in blocks, so only the outputs, the residual stream and one sequence's keys and
values grow with the batch; `pympa.verify.oracle_cost` adds up the bytes.
"""

from pympa.verify.reference.attention_branch import attention_branch
from pympa.verify.reference.experts import (
    choose,
    gate_values,
    group_values,
    kept,
    largest,
    mlp_branch,
    moe_branch,
)
from pympa.verify.reference.formulas import (
    F64,
    Rounding,
    RoundingTo,
    activate,
    exactly,
    linear,
    mlp,
    norm,
)
from pympa.verify.reference.model import embed, forward, logits
from pympa.verify.reference.rope import rope
from pympa.verify.reference.softmax_attention import attention

__all__ = [
    "F64",
    "Rounding",
    "RoundingTo",
    "activate",
    "attention",
    "attention_branch",
    "choose",
    "embed",
    "exactly",
    "forward",
    "gate_values",
    "group_values",
    "kept",
    "largest",
    "linear",
    "logits",
    "mlp",
    "mlp_branch",
    "moe_branch",
    "norm",
    "rope",
]
