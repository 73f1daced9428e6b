"""One arena for all of a rank's memory: weights, activations, states, messages, workspaces.

A stack of 64-byte-aligned arrays: `scope()` gives back what was taken inside it. The first step
makes the arena grow; every later step reuses the same blocks, so nothing is allocated inside a
timed step (`blocks` stays what it was). `dry=True` gives arrays that have a shape and no memory:
running a model on them measures its memory without having it.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT_BYTES = 64  # one cache line, one AVX-512 register
BLOCK_BYTES = 16 << 20  # granularity of growth; small models stay small
Array = NDArray[Any]


@dataclass
class _Block:
    memory: NDArray[np.uint8] | None
    size: int
    used: int = 0


class Arena:
    """A growing stack allocator that knows its high-water mark.

    Args:
        dry: hand out arrays without memory (zero strides, read-only), only count bytes.
    """

    def __init__(self, *, dry: bool = False) -> None:
        self.dry = dry
        self.used_bytes = 0
        self.peak_bytes = 0
        self._blocks: list[_Block] = []
        self._current = 0

    @property
    def blocks(self) -> int:
        """Blocks taken from the system so far."""
        return len(self._blocks)

    @property
    def reserved_bytes(self) -> int:
        """Bytes taken from the system so far."""
        return sum(block.size for block in self._blocks)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any] | type[Any]) -> Array:
        """Return an uninitialised C-contiguous array that lives until its scope ends."""
        dtype = np.dtype(dtype)
        count = math.prod(shape)
        size = -(-count * dtype.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        if self.dry:
            return np.broadcast_to(np.zeros((), dtype), shape)
        block = self._block_with_room(size)
        memory = block.memory
        if memory is None:
            raise RuntimeError("arena: used after close()")
        raw = memory[block.used : block.used + count * dtype.itemsize]
        block.used += size
        return raw.view(dtype).reshape(shape)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Give back, on exit, everything taken inside."""
        used, current = self.used_bytes, self._current
        offset = self._blocks[current].used if self._blocks else 0
        try:
            yield
        finally:
            for block in self._blocks[current:]:
                block.used = 0
            if self._blocks:
                self._blocks[current].used = offset
            self.used_bytes, self._current = used, current

    def restart_peak(self) -> int:
        """Return the high-water mark and start a new one from what is in use."""
        peak, self.peak_bytes = self.peak_bytes, self.used_bytes
        return peak

    def close(self) -> None:
        """Return all memory to the system; arrays handed out must no longer be used."""
        self._blocks = []
        self._current = 0
        self.used_bytes = 0

    def _block_with_room(self, size: int) -> _Block:
        while self._current < len(self._blocks):
            block = self._blocks[self._current]
            if block.used + size <= block.size:
                return block
            if self._current + 1 == len(self._blocks):
                break
            self._current += 1
        self._blocks.append(_new_block(max(size, BLOCK_BYTES)))
        self._current = len(self._blocks) - 1
        return self._blocks[-1]


def _new_block(size: int) -> _Block:
    """Map pages that go back to the system when the last array on them is gone."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return _Block(np.frombuffer(pages, np.uint8), size)
