"""The MLP branch: x + down(act(up(norm(x)))), columns split over `tp`.

Norms may also follow the branch, see `LayerSpec.norm_order`.
"""

from __future__ import annotations

from functools import partial

from pympa.model.batch import MicroBatch
from pympa.model.layer import Layer, Probe
from pympa.parallel.tensor import add_branch
from pympa.runtime.arena import Array


class Mlp:
    """The second branch of a layer without experts.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._tp = layer.resources.transports["tp"]

    def __call__(self, x: Array, read: Array, part: MicroBatch, probe: Probe | None) -> None:
        """Add the MLP: read [rows, d] -> columns of this rank, chunk by chunk -> x [rows, d].

        Collective.

        Args:
            x: the residual stream.
            read: the rows that the branch reads: x, or the stream before the block.
            part: the micro-batch of the rows.
            probe: a function that gets the branch, or None.
        """
        layer, kernels = self._layer, self._layer.kernels
        weights = layer.mlp("mlp")
        for here in layer.chunks(len(x)):
            with layer.arena.scope():
                normed = layer.before("mlp", read[here])
                self._tp.poll()
                add_branch(
                    kernels,
                    self._tp,
                    layer.arena,
                    partial(kernels.mlp, normed, weights),
                    layer.vector("mlp.down_bias"),
                    x[here],
                    layer.probed(probe, "mlp", part.layout, here),
                    partial(layer.after, "mlp") if layer.has_post_norm("mlp") else None,
                )
