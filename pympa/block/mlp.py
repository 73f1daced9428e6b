"""The MLP branch: x + down(act(up(norm(x)))), columns split over `tp`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Array
from pympa.batch import MicroBatch
from pympa.block.context import Context, Probe
from pympa.parallel.capacity import Used
from pympa.parallel.tensor import add_branch


class Mlp:
    """The dense second branch of a block.

    Args:
        context: the block.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._tp = context.rank.transports["tp"]

    def __call__(self, x: Array, part: MicroBatch, used: Used, probe: Probe | None) -> None:
        """Add the MLP: x [rows, d] -> hidden [rows, columns of this rank] -> [rows, d]."""
        context = self._context
        for here in context.chunks(len(x)):
            with context.arena.scope():
                hidden = hidden_state(context, "mlp", context.normed("mlp_norm", x[here]))
                self._tp.poll()

                def see(array: Array, here: slice = here) -> None:
                    if probe is not None:
                        layout = part.layout.slice(here.start, here.stop)
                        probe(f"{context.name}.mlp", array, layout)

                add_branch(
                    context.kernels,
                    self._tp,
                    context.arena,
                    hidden,
                    context.matrix("mlp.down"),
                    context.vector("mlp.down_bias"),
                    x[here],
                    see if probe is not None else None,
                )


def hidden_state(
    context: Context, mlp: str, x: Array, group_rows: NDArray[np.int64] | None = None
) -> Array:
    """Return act(x up^T), or act(x gate^T) * (x up^T) where there is a gate.

    Args:
        context: the block.
        mlp: prefix of the weights' names.
        x: `[rows, d_model]`.
        group_rows: rows of each of a group of weights, or None for a single weight.
    """
    up = context.matrix(f"{mlp}.up")
    hidden = context.arena.empty((len(x), up.n), context.dtype)
    up_bias = context.vector(f"{mlp}.up_bias")
    activation = context.layer.activation
    if context.has(f"{mlp}.gate"):
        context.kernels.gated_linear(
            x,
            context.matrix(f"{mlp}.gate"),
            up,
            hidden,
            activation=activation,
            gate_bias=context.vector(f"{mlp}.gate_bias"),
            up_bias=up_bias,
            group_rows=group_rows,
        )
    else:
        context.kernels.linear(
            x, up, hidden, bias=up_bias, activation=activation, group_rows=group_rows
        )
    return hidden
