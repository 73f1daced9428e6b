"""One arena for all of a rank's memory: weights, activations, states, messages, workspaces.

A stack of aligned arrays: `scope()` gives back what was taken inside it. The first step
makes the arena grow; every later step reuses the same blocks, so nothing is allocated inside a
timed step (`blocks` stays what it was). On a device the blocks are the device's, and its kernels
must use them in the order of one stream, or of events. `dry=True` gives arrays that have a shape
and no memory: running a model on them measures its memory without having it.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pympa.device import Device
from pympa.ledger import Ledger, Use

ALIGNMENT_BYTES = 64  # one cache line, one AVX-512 register
DEVICE_ALIGNMENT_BYTES = 256  # what cudaMalloc gives: vector loads and bulk copies want 16 to 128
BLOCK_BYTES = 16 << 20  # granularity of growth; small models stay small
_NOTHING = bytes(16)  # read-only, and room for the one element that a dry array repeats
Array = NDArray[Any]


class Place(NamedTuple):
    """Where another process of the node finds an array that may be shared.

    fd: of the memory, in process `pid`. inode: tells one memory from a later one of the same fd.
    offset: bytes from its start.
    """

    pid: int
    fd: int
    inode: int
    offset: int


@dataclass
class _Block:
    memory: Array | None
    size: int
    used: int = 0
    fd: int | None = None


class _Stack:
    """Blocks of one kind of memory, filled one after the other."""

    def __init__(self, new_block: Callable[[int], _Block]) -> None:
        self.blocks: list[_Block] = []
        self.size = 0  # of all blocks
        self._new_block = new_block
        self._current = 0

    def take(self, size: int) -> Array | None:
        """Return some bytes; None where blocks have no memory."""
        block = self._block_with_room(size)
        first, block.used = block.used, block.used + size
        return None if block.memory is None else block.memory[first : block.used]

    def mark(self) -> tuple[int, int]:
        return self._current, self.blocks[self._current].used if self.blocks else 0

    def reset(self, mark: tuple[int, int]) -> None:
        current, used = mark
        for block in self.blocks[current:]:
            block.used = 0
        if self.blocks:
            self.blocks[current].used = used
        self._current = current

    def _block_with_room(self, size: int) -> _Block:
        while self._current < len(self.blocks):
            block = self.blocks[self._current]
            if block.used + size <= block.size:
                return block
            if self._current + 1 == len(self.blocks):
                break
            self._current += 1
        self.blocks.append(self._new_block(max(size, BLOCK_BYTES)))
        self.size += self.blocks[-1].size
        self._current = len(self.blocks) - 1
        return self.blocks[-1]


class Arena:
    """A growing stack allocator that knows its high-water mark.

    Args:
        dry: hand out arrays without memory (zero strides, read-only), only count bytes.
        device: whose memory it is; None means the host's.
        alignment_bytes: of every array; None means 64 on the host and 256 on a device.

    Attributes:
        ledger: where to write down what bytes are for; None, as real work has no time for it.
    """

    def __init__(
        self,
        *,
        dry: bool = False,
        device: Device | None = None,
        alignment_bytes: int | None = None,
    ) -> None:
        self.dry = dry
        on_host = device is None
        self.alignment_bytes = alignment_bytes or (
            ALIGNMENT_BYTES if on_host else DEVICE_ALIGNMENT_BYTES
        )
        self.ledger: Ledger | None = None
        self.used_bytes = 0
        self.peak_bytes = 0
        self._device = device
        self._own, self._shared = self._stacks()
        self._closed = False

    @property
    def blocks(self) -> int:
        """Blocks taken from the system so far."""
        return len(self._own.blocks) + len(self._shared.blocks)

    @property
    def mapped_bytes(self) -> int:
        """Of the blocks: what the system may have to find; a dry arena takes as many.

        More than the peak, as an array lies in one block and what is left of a block may be small.
        """
        return self._own.size + self._shared.size

    def empty(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any] | type[Any],
        use: Use = "activations",
        *,
        shared: bool = False,
    ) -> Array:
        """Return an uninitialised C-contiguous array that lives until its scope ends.

        Args:
            shape: of the array.
            dtype: of the array.
            use: what it is for.
            shared: other processes may read it, at its `place`.

        Raises:
            ValueError: it should be shared and is on a device.
        """
        if shared and self._device is not None:
            raise ValueError("arena: expected memory of the host to share; got that of a device")
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        size = -(-nbytes // self.alignment_bytes) * self.alignment_bytes
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        if self.ledger is not None:
            self.ledger.take(use, size, self.used_bytes)
        if self._closed:
            raise RuntimeError("arena: used after close()")
        raw = (self._shared if shared else self._own).take(size)
        if raw is None:
            return np.ndarray(shape, dtype, _NOTHING, strides=(0,) * len(shape))
        array: Array = raw[:nbytes].view(dtype).reshape(shape)
        return array

    def place(self, array: Array) -> Place:
        """Return where an array from `empty(shared=True)` is.

        Raises:
            ValueError: it is not from there.
        """
        for block in self._shared.blocks:
            if block.memory is None or block.fd is None:
                continue
            offset = array.ctypes.data - block.memory.ctypes.data
            if 0 <= offset <= block.size - array.nbytes:
                return Place(os.getpid(), block.fd, os.fstat(block.fd).st_ino, offset)
        raise ValueError("arena: expected an array from empty(shared=True)")

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Give back, on exit, everything taken inside."""
        used, own, shared = self.used_bytes, self._own.mark(), self._shared.mark()
        mark = self.ledger.mark() if self.ledger is not None else {}
        try:
            yield
        finally:
            if self.ledger is not None:
                self.ledger.release(mark)
            self._own.reset(own)
            self._shared.reset(shared)
            self.used_bytes = used

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Tell the ledger which part of the model takes what is taken inside."""
        if self.ledger is None:
            yield
            return
        outside, self.ledger.part = self.ledger.part, name
        try:
            yield
        finally:
            self.ledger.part = outside

    def restart_peak(self) -> int:
        """Return the high-water mark and start a new one from what is in use."""
        peak, self.peak_bytes = self.peak_bytes, self.used_bytes
        return peak

    def close(self) -> None:
        """Return all memory to the system; arrays handed out must no longer be used."""
        for block in self._shared.blocks:
            if block.fd is not None:
                os.close(block.fd)
        self._own, self._shared = self._stacks()
        self._closed = True
        self.used_bytes = 0

    def _stacks(self) -> tuple[_Stack, _Stack]:
        """Return stacks without blocks, of private memory and of such as others may read."""
        device = self._device
        if self.dry:
            return _Stack(_dry_block), _Stack(_dry_block)
        if device is None:
            return _Stack(_private_block), _Stack(_shared_block)
        own = _Stack(lambda size: _Block(device.allocate(size), size))
        return own, _Stack(_shared_block)


def _dry_block(size: int) -> _Block:
    return _Block(None, size)


def _private_block(size: int) -> _Block:
    """Map pages that go back to the system when the last array on them is gone."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return _Block(np.frombuffer(pages, np.uint8), size)


def _shared_block(size: int) -> _Block:
    """Map memory that has no name in any file system, so that nothing can stay behind (Linux)."""
    fd = os.memfd_create("pympa")
    os.ftruncate(fd, size)
    return _Block(np.frombuffer(mmap.mmap(fd, size), np.uint8), size, fd=fd)
