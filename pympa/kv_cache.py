"""Keys and values that are kept from one micro-batch to the next, and which of them still count."""

from __future__ import annotations

import numpy as np

from pympa.arena import Arena, Array
from pympa.batch import MicroBatch
from pympa.kernels import KvBlock
from pympa.layout import Layout


class KeysAtHand:
    """Which keys attention meets: of the sequences of the micro-batch in hand, up to its own.

    Where micro-batches cut sequences, a sequence that has ended has no queries any more: its keys
    stay where they are, and are neither read nor sent again. All layers of a step share one.

    Args:
        parts: micro-batches that were taken up already.

    Attributes:
        layouts: keys of each rank of the ring.
        first, new, stop: rows of this rank's cache, where the keys at hand begin, where those of
            the micro-batch in hand begin, and where both end.
    """

    def __init__(self, *parts: MicroBatch) -> None:
        self.layouts: list[Layout] = []
        self.first = self.new = self.stop = 0
        for part in parts:
            self.take(part)

    def take(self, part: MicroBatch) -> None:
        """Take up the next micro-batch."""
        kept = [layout.since(part.sequences) for layout in self.layouts]
        kept = kept or [Layout(())] * len(part.ring_keys)
        both = zip(kept, part.ring_keys, strict=True)
        self.layouts = [old.then(new) if old.ranges else new for old, new in both]
        self.new = self.stop
        self.first = self.new - kept[part.ring_index].rows
        self.stop = self.new + part.ring_keys[part.ring_index].rows


class KvCache:
    """Keys and values of one layer, with a fixed capacity.

    Args:
        arena: memory.
        capacity: rows of this rank.
        k_shape: (kv heads, head_dim). v_shape: (kv heads, v_head_dim).
        dtype: of keys and values.
        at_hand: tells which rows count.
        shared: other ranks may read them.
    """

    def __init__(
        self,
        arena: Arena,
        capacity: int,
        k_shape: tuple[int, int],
        v_shape: tuple[int, int],
        dtype: np.dtype[np.generic],
        at_hand: KeysAtHand,
        *,
        shared: bool,
    ) -> None:
        self._k = arena.empty((capacity, *k_shape), dtype, "keys/values", shared=shared)
        self._v = arena.empty((capacity, *v_shape), dtype, "keys/values", shared=shared)
        self._at_hand = at_hand

    @property
    def layouts(self) -> list[Layout]:
        """Layout of the keys at hand, by rank of the ring."""
        return self._at_hand.layouts

    def new(self) -> tuple[Array, Array]:
        """Return the rows of k and v that the micro-batch's keys and values go to."""
        return self._rows(self._at_hand.new)

    def block(self, index: int) -> KvBlock:
        """Return the keys at hand of rank `index` of the ring, this one, and their values."""
        return KvBlock(*self._rows(self._at_hand.first), self._at_hand.layouts[index])

    def _rows(self, first: int) -> tuple[Array, Array]:
        return self._k[first : self._at_hand.stop], self._v[first : self._at_hand.stop]
