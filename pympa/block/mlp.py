"""The MLP branch: x + down(act(up(norm(x)))), columns split over `tp`."""

from __future__ import annotations

from functools import partial

from pympa.arena import Array
from pympa.batch import MicroBatch
from pympa.block.context import Context, Probe
from pympa.parallel.capacity import Capacity
from pympa.parallel.tensor import add_branch


class Mlp:
    """The dense second branch of a block.

    Args:
        context: the block.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._tp = context.rank.transports["tp"]

    def __call__(self, x: Array, part: MicroBatch, capacity: Capacity, probe: Probe | None) -> None:
        """Add the MLP: x [rows, d] -> columns of this rank, block by block -> [rows, d]."""
        context = self._context
        weights = context.mlp("mlp")
        for here in context.chunks(len(x)):
            with context.arena.scope():
                normed = context.normed("mlp_norm", x[here])
                self._tp.poll()

                def see(array: Array, here: slice = here) -> None:
                    if probe is not None:
                        layout = part.layout.slice(here.start, here.stop)
                        probe(f"{context.name}.mlp", array, layout)

                add_branch(
                    context.kernels,
                    self._tp,
                    context.arena,
                    partial(context.kernels.mlp, normed, weights),
                    context.vector("mlp.down_bias"),
                    x[here],
                    see if probe is not None else None,
                )
