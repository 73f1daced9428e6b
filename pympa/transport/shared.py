"""Memory of other processes of the node, mapped once and read instead of messages (Linux).

A rank's shared blocks have no name in any file system. Other ranks open them through the descriptor
table of its process, which the system allows to processes of the same user.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.runtime.arena import Array, SharedAddress

Shape = tuple[int, ...]


class SharedMemory:
    """The blocks of other ranks that this rank has mapped."""

    def __init__(self) -> None:
        self._mapped: dict[tuple[int, int], NDArray[np.uint8]] = {}

    def view(self, address: SharedAddress, shape: Shape, dtype: np.dtype[Any]) -> Array:
        """Return another rank's array, read-only."""
        block = self._mapped.get((address.pid, address.inode))
        if block is None:
            block = map_block(address)
            self._mapped[address.pid, address.inode] = block
        count = int(np.prod(shape)) * dtype.itemsize
        return block[address.offset : address.offset + count].view(dtype).reshape(shape)


def map_block(address: SharedAddress) -> NDArray[np.uint8]:
    """Map the whole block of an address.

    Raises:
        OSError: this process may not map it, or the block no longer exists.
    """
    fd = os.open(f"/proc/{address.pid}/fd/{address.fd}", os.O_RDONLY)
    try:
        if os.fstat(fd).st_ino != address.inode:
            raise OSError("the block no longer exists")
        return np.frombuffer(mmap.mmap(fd, 0, prot=mmap.PROT_READ), np.uint8)
    finally:
        os.close(fd)
