"""One transformer block of one rank: the attention branch, then the MLP or expert branch.

Each adds to the residual stream `[rows, d_model]` in place and keeps its layout, so blocks compose.
"""

from __future__ import annotations

from pympa.block.attention import Attention
from pympa.block.context import Context, Probe
from pympa.block.mlp import Mlp
from pympa.block.moe import Moe

__all__ = ["Attention", "Context", "Mlp", "Moe", "Probe", "feed_forward"]


def feed_forward(context: Context) -> Mlp | Moe:
    """Return the second branch of a block, dense or with experts."""
    return Moe(context) if context.layer.experts else Mlp(context)
