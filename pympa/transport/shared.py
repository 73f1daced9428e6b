"""Memory of other processes of the node, mapped once and read in place of messages (Linux).

A rank's shared blocks have no name in any file system: others open them through the descriptor
table of its process, which the system allows to processes of one user.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Array, Place

Shape = tuple[int, ...]


class SharedMemory:
    """The blocks of other ranks that this rank has mapped."""

    def __init__(self) -> None:
        self._mapped: dict[tuple[int, int], NDArray[np.uint8]] = {}

    def view(self, place: Place, shape: Shape, dtype: np.dtype[Any]) -> Array:
        """Return another rank's array, to read only."""
        block = self._mapped.get((place.pid, place.inode))
        if block is None:
            block = map_block(place)
            self._mapped[place.pid, place.inode] = block
        count = int(np.prod(shape)) * dtype.itemsize
        return block[place.offset : place.offset + count].view(dtype).reshape(shape)


def map_block(place: Place) -> NDArray[np.uint8]:
    """Map the whole block that a place lies in.

    Raises:
        OSError: this process may not, or the block is gone.
    """
    fd = os.open(f"/proc/{place.pid}/fd/{place.fd}", os.O_RDONLY)
    try:
        if os.fstat(fd).st_ino != place.inode:
            raise OSError("the block is gone")
        return np.frombuffer(mmap.mmap(fd, 0, prot=mmap.PROT_READ), np.uint8)
    finally:
        os.close(fd)
