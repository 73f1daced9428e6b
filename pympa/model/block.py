"""One transformer block of one rank: the attention branch, then the MLP or expert branch.

Each adds to the residual stream `[rows, d_model]` in place and keeps its layout, so blocks compose.
"""

from __future__ import annotations

from collections.abc import Sequence

from pympa.model.attention import Attention
from pympa.model.batch import MicroBatch
from pympa.model.kv_cache import KvCache, VisibleKeys
from pympa.model.layer import Layer, Probe
from pympa.model.mlp import Mlp
from pympa.model.moe import Moe
from pympa.model.projections import RopeTable
from pympa.parallel.capacity import Capacity
from pympa.runtime.arena import Array


class BlockStep:
    """The data that a block keeps from one micro-batch to the next in a step.

    Args:
        cache: the keys and values; None if no micro-batch needs those of another one.
        capacity: the used capacity of the experts; None without experts.
    """

    def __init__(self, cache: KvCache | None, capacity: Capacity | None) -> None:
        self.cache, self.capacity = cache, capacity


class Block:
    """One transformer block.

    Args:
        layer: the layer with its weights and the rank's resources.
    """

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._attention = Attention(layer)
        self._mlp = None if layer.spec.experts else Mlp(layer)
        self._moe = Moe(layer) if layer.spec.experts else None

    @property
    def kv_row_bytes(self) -> int:
        """The bytes of a token's keys and values on this rank."""
        return self._attention.kv_row_bytes

    def start_step(
        self,
        parts: Sequence[MicroBatch],
        visible: VisibleKeys,
        lengths: Sequence[int],
        *,
        keeps_kv: bool,
    ) -> BlockStep:
        """Return the data that the block keeps in a step, in memory of the arena.

        Args:
            parts: the micro-batches of the step.
            visible: the visible keys of each micro-batch.
            lengths: the number of tokens of each sequence of the batch.
            keeps_kv: whether micro-batches cut sequences.
        """
        layer, capacity = self._layer, None
        if self._moe is not None:
            capacity = Capacity(layer.spec, [part.layouts for part in parts], lengths)
        with layer.arena.part(layer.name):
            cache = self._attention.cache(parts, visible) if keeps_kv else None
        return BlockStep(cache, capacity)

    def __call__(
        self,
        x: Array,
        part: MicroBatch,
        rope: RopeTable | None,
        kept: BlockStep,
        probe: Probe | None,
    ) -> None:
        """Add both branches to x [rows, d]. Collective.

        Args:
            x: the residual stream.
            part: the micro-batch of the rows.
            rope: the tables of cos and sin, float32 `[positions, half]`, or None.
            kept: the data from `start_step`.
            probe: a function that gets every branch, or None.
        """
        layer = self._layer
        with layer.arena.part(layer.name), layer.arena.scope():
            read = x
            if layer.spec.parallel:
                read = layer.arena.empty(x.shape, x.dtype)
                layer.kernels.copy(x, read)
            with layer.arena.scope():
                cache = kept.cache or self._attention.cache([part], VisibleKeys(part))
                self._attention(x, part, rope, cache, probe)
            if self._moe is not None and kept.capacity is not None:
                self._moe(x, read, part, kept.capacity, probe)
            if self._mlp is not None:
                self._mlp(x, read, part, probe)
