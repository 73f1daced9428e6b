"""One arena for all of a rank's memory: weights, activations, states, messages, workspaces.

It is a stack of aligned arrays: `scope()` frees what was allocated inside it. The arena grows in
the first step; every later step reuses the same blocks, so nothing is allocated in a timed step
(`blocks` stays the same). What is used while weights are loaded has its own blocks and leaves no
gaps between weights. On a device the blocks are device memory, and kernels must use them in the
order of one stream, or of events. `dry=True` gives arrays with a shape and no memory: running a
model on them measures its memory without allocating it.
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

from pympa.hardware.device import Device
from pympa.runtime.ledger import Ledger, Use

ALIGNMENT_BYTES = 64  # one cache line, one AVX-512 register
DEVICE_ALIGNMENT_BYTES = 256  # as from cudaMalloc: vector loads and bulk copies need 16 to 128
BLOCK_BYTES = 16 << 20  # granularity of growth, so that small models stay small
_NOTHING = bytes(16)  # read-only, the one element that a dry array repeats
Array = NDArray[Any]


class SharedAddress(NamedTuple):
    """The address of a shared array for other processes of the node.

    Attributes:
        pid: the number of the process that owns the memory.
        fd: the file descriptor of the memory in that process.
        inode: the inode of the memory, which differs from that of a later one with the same fd.
        offset: the offset of the array in bytes.
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
    touched: int = 0  # the most bytes that were in use


class _Stack:
    """Blocks of one kind of memory, filled one after the other."""

    def __init__(self, new_block: Callable[[int], _Block]) -> None:
        self.blocks: list[_Block] = []
        self.size = 0  # bytes of all blocks
        self._new_block = new_block
        self._current = 0

    def take(self, size: int) -> Array | None:
        """Return some bytes; None if blocks have no memory."""
        block = self._block_with_room(size)
        first, block.used = block.used, block.used + size
        block.touched = max(block.touched, block.used)
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


class _Stacks(NamedTuple):
    """The stacks of an arena.

    Attributes:
        own: private memory.
        loading: private memory of arrays that are in use only while weights are loaded.
        shared: memory that other processes may read.
    """

    own: _Stack
    loading: _Stack
    shared: _Stack


class Arena:
    """A growing stack allocator that records its high-water mark.

    Args:
        dry: whether arrays have no memory (zero strides, read-only), and bytes are only counted.
        device: the device of the memory; None means the host.
        alignment_bytes: the alignment of every array; None means 64 on the host and 256 on a
            device.

    Attributes:
        ledger: the ledger that records the use of bytes; None in real runs, to save time.
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
        self._stacks = self._new_stacks()
        self._closed = False

    @property
    def blocks(self) -> int:
        """The number of blocks allocated from the system so far."""
        return sum(len(stack.blocks) for stack in self._stacks)

    @property
    def mapped_bytes(self) -> int:
        """The bytes of all blocks, which the system may have to provide; a dry arena has as many.

        More than the peak, because an array lies in one block and the end of a block may be unused.
        """
        return sum(stack.size for stack in self._stacks)

    @property
    def touched_bytes(self) -> int:
        """The bytes of blocks that have been in use, all of which a process then holds."""
        return sum(block.touched for stack in self._stacks for block in stack.blocks)

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
            shape: the shape of the array.
            dtype: the dtype of the array.
            use: the use of the array, for the ledger.
            shared: whether other processes may read it, at its `shared_address`.

        Raises:
            ValueError: a shared array is requested on a device.
        """
        if shared and self._device is not None:
            raise ValueError("arena: shared: expected host memory; got device memory")
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        size = -(-nbytes // self.alignment_bytes) * self.alignment_bytes
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        if self.ledger is not None:
            self.ledger.take(use, size, self.used_bytes)
        if self._closed:
            raise RuntimeError("arena: used after close()")
        stacks = self._stacks
        stack = stacks.shared if shared else stacks.loading if use == "loading" else stacks.own
        raw = stack.take(size)
        if raw is None:
            return np.ndarray(shape, dtype, _NOTHING, strides=(0,) * len(shape))
        array: Array = raw[:nbytes].view(dtype).reshape(shape)
        return array

    def shared_address(self, array: Array) -> SharedAddress:
        """Return the address of an array from `empty(shared=True)`.

        Raises:
            ValueError: the array is not from there.
        """
        for block in self._stacks.shared.blocks:
            if block.memory is None or block.fd is None:
                continue
            offset = array.ctypes.data - block.memory.ctypes.data
            if 0 <= offset <= block.size - array.nbytes:
                return SharedAddress(os.getpid(), block.fd, os.fstat(block.fd).st_ino, offset)
        raise ValueError("arena: expected an array from empty(shared=True)")

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Free, on exit, everything that was allocated inside."""
        used, marks = self.used_bytes, [stack.mark() for stack in self._stacks]
        mark = self.ledger.mark() if self.ledger is not None else 0
        try:
            yield
        finally:
            if self.ledger is not None:
                self.ledger.release(mark)
            for stack, top in zip(self._stacks, marks, strict=True):
                stack.reset(top)
            self.used_bytes = used

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Record everything that is allocated inside as a part of the model."""
        if self.ledger is None:
            yield
            return
        outside, self.ledger.part = self.ledger.part, name
        try:
            yield
        finally:
            self.ledger.part = outside

    def restart_peak(self) -> int:
        """Return the high-water mark and restart it from the bytes in use."""
        peak, self.peak_bytes = self.peak_bytes, self.used_bytes
        return peak

    def end_loading(self) -> None:
        """Return memory that was in use only while weights were loaded, to the system."""
        self._stacks = self._stacks._replace(loading=self._new_stacks().loading)

    def close(self) -> None:
        """Return all memory to the system; its arrays must no longer be used."""
        for block in self._stacks.shared.blocks:
            if block.fd is not None:
                os.close(block.fd)
        self._stacks = self._new_stacks()
        self._closed = True
        self.used_bytes = 0

    def _new_stacks(self) -> _Stacks:
        """Return empty stacks."""
        device, private, shared = self._device, _private_block, _shared_block
        if self.dry:
            private = shared = _dry_block
        elif device is not None:

            def private(size: int) -> _Block:
                return _Block(device.allocate(size), size)

        return _Stacks(_Stack(private), _Stack(private), _Stack(shared))


def _dry_block(size: int) -> _Block:
    return _Block(None, size)


def _private_block(size: int) -> _Block:
    """Map pages that return to the system when the last array on them is freed."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return _Block(np.frombuffer(pages, np.uint8), size)


def _shared_block(size: int) -> _Block:
    """Map memory without a name in any file system, so that nothing can remain (Linux)."""
    fd = os.memfd_create("pympa")
    os.ftruncate(fd, size)
    return _Block(np.frombuffer(mmap.mmap(fd, size), np.uint8), size, fd=fd)
