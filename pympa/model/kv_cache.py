"""Keys and values that are kept from one micro-batch to the next, and the visible ones of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pympa.kernels import KvBlock
from pympa.model.batch import MicroBatch
from pympa.plan.layout import Layout, split_batch, split_tokens
from pympa.plan.mesh import Mesh
from pympa.runtime.arena import Arena, Array


def kept_rows(mesh: Mesh, lengths: Sequence[int], window: int | None) -> int:
    """Return the rows of keys that a rank keeps of whole sequences, in one layer.

    Args:
        mesh: the rank's coordinates.
        lengths: the number of tokens of each sequence of the batch.
        window: the keys that a query sees; None means all.
    """
    plan = mesh.plan
    seen = [length if window is None else min(length, window) for length in lengths]
    group = split_batch(seen, plan.dp)[mesh.coordinate("dp")]
    layouts = split_tokens(group, plan.cp, plan.balance)
    first = mesh.coordinate("cp") // plan.head_exchange * plan.head_exchange
    return sum(layout.rows for layout in layouts[first : first + plan.head_exchange])


class VisibleKeys:
    """The keys of the sequences of a micro-batch, up to its last tokens.

    If micro-batches cut sequences, a sequence that has ended has no more queries: its keys stay in
    the cache, but are not read or sent again. All layers of a step share one object.

    Args:
        parts: the micro-batches that have been computed before.

    Attributes:
        layouts: the keys of each rank of the ring.
        first: the first row of the visible keys in this rank's cache.
        new: the first row of the keys of the current micro-batch.
        stop: the row after the last visible key.
    """

    def __init__(self, *parts: MicroBatch) -> None:
        self.layouts: list[Layout] = []
        self.first = self.new = self.stop = 0
        for part in parts:
            self.advance(part)

    def advance(self, part: MicroBatch) -> None:
        """Make `part` the current micro-batch."""
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
        arena: the memory.
        capacity: the number of rows of this rank.
        k_shape: the pair (kv heads, head_dim).
        v_shape: the pair (kv heads, v_head_dim).
        dtype: the dtype of keys and values.
        visible: the visible rows.
        shared: whether other ranks may read them.
    """

    def __init__(
        self,
        arena: Arena,
        capacity: int,
        k_shape: tuple[int, int],
        v_shape: tuple[int, int],
        dtype: np.dtype[np.generic],
        visible: VisibleKeys,
        *,
        shared: bool,
    ) -> None:
        self._k = arena.empty((capacity, *k_shape), dtype, "keys/values", shared=shared)
        self._v = arena.empty((capacity, *v_shape), dtype, "keys/values", shared=shared)
        self._visible = visible

    @property
    def layouts(self) -> list[Layout]:
        """The visible keys of each rank of the ring."""
        return self._visible.layouts

    def new(self) -> tuple[Array, Array]:
        """Return the rows of k and v for the current micro-batch's keys and values."""
        return self._rows(self._visible.new)

    def block(self, index: int) -> KvBlock:
        """Return the visible keys and values of this rank; `index` is its index in the ring."""
        return KvBlock(*self._rows(self._visible.first), self._visible.layouts[index])

    def _rows(self, first: int) -> tuple[Array, Array]:
        return self._k[first : self._visible.stop], self._v[first : self._visible.stop]
